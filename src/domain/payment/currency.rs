//! Currencies: ISO 4217 alphabetic codes that have a minor unit.
//!
//! Source: ISO 4217 "List one" as published on 2026-01-01 by its maintenance agency (SIX), every code whose
//! minor unit is a number. Funds codes (`CLF`, `UYW`, `BOV`, …) have one; metals, baskets and test codes
//! (`XAU`, `XDR`, `XTS`, `XXX`, …) have "N.A." and are not accepted. `BGN` left the list on that day, when
//! Bulgaria adopted the euro; it stays valid, because payments in it are still processed. An update may add
//! codes but must keep these, because the validity of a record must not change with a release.

/// A currency of the ISO 4217 list that has a minor unit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Currency(&'static (&'static str, u8));

impl Currency {
    /// The currency with this upper-case alphabetic code; `None` if there is none with a minor unit.
    pub fn from_code(code: &str) -> Option<Self> {
        // Arrays are compared as one integer, texts by a call.
        let code: [u8; 3] = code.as_bytes().try_into().ok()?;
        let index =
            TABLE.binary_search_by_key(&Some(&code), |(known, _)| known.as_bytes().first_chunk()).ok()?;
        TABLE.get(index).map(Currency)
    }

    /// The three-letter code.
    pub fn code(self) -> &'static str {
        self.0.0
    }

    /// Decimal places of the minor unit: 2 for `EUR`, 0 for `JPY`, 3 for `KWD`, 4 for `CLF`.
    pub fn minor_unit(self) -> u8 {
        self.0.1
    }
}

/// Code and minor unit, sorted by code for the binary search.
#[rustfmt::skip]
static TABLE: &[(&str, u8)] = &[
    ("AED", 2), ("AFN", 2), ("ALL", 2), ("AMD", 2), ("AOA", 2), ("ARS", 2), ("AUD", 2), ("AWG", 2),
    ("AZN", 2), ("BAM", 2), ("BBD", 2), ("BDT", 2), ("BGN", 2), ("BHD", 3), ("BIF", 0), ("BMD", 2),
    ("BND", 2), ("BOB", 2), ("BOV", 2), ("BRL", 2), ("BSD", 2), ("BTN", 2), ("BWP", 2), ("BYN", 2),
    ("BZD", 2), ("CAD", 2), ("CDF", 2), ("CHE", 2), ("CHF", 2), ("CHW", 2), ("CLF", 4), ("CLP", 0),
    ("CNY", 2), ("COP", 2), ("COU", 2), ("CRC", 2), ("CUP", 2), ("CVE", 2), ("CZK", 2), ("DJF", 0),
    ("DKK", 2), ("DOP", 2), ("DZD", 2), ("EGP", 2), ("ERN", 2), ("ETB", 2), ("EUR", 2), ("FJD", 2),
    ("FKP", 2), ("GBP", 2), ("GEL", 2), ("GHS", 2), ("GIP", 2), ("GMD", 2), ("GNF", 0), ("GTQ", 2),
    ("GYD", 2), ("HKD", 2), ("HNL", 2), ("HTG", 2), ("HUF", 2), ("IDR", 2), ("ILS", 2), ("INR", 2),
    ("IQD", 3), ("IRR", 2), ("ISK", 0), ("JMD", 2), ("JOD", 3), ("JPY", 0), ("KES", 2), ("KGS", 2),
    ("KHR", 2), ("KMF", 0), ("KPW", 2), ("KRW", 0), ("KWD", 3), ("KYD", 2), ("KZT", 2), ("LAK", 2),
    ("LBP", 2), ("LKR", 2), ("LRD", 2), ("LSL", 2), ("LYD", 3), ("MAD", 2), ("MDL", 2), ("MGA", 2),
    ("MKD", 2), ("MMK", 2), ("MNT", 2), ("MOP", 2), ("MRU", 2), ("MUR", 2), ("MVR", 2), ("MWK", 2),
    ("MXN", 2), ("MXV", 2), ("MYR", 2), ("MZN", 2), ("NAD", 2), ("NGN", 2), ("NIO", 2), ("NOK", 2),
    ("NPR", 2), ("NZD", 2), ("OMR", 3), ("PAB", 2), ("PEN", 2), ("PGK", 2), ("PHP", 2), ("PKR", 2),
    ("PLN", 2), ("PYG", 0), ("QAR", 2), ("RON", 2), ("RSD", 2), ("RUB", 2), ("RWF", 0), ("SAR", 2),
    ("SBD", 2), ("SCR", 2), ("SDG", 2), ("SEK", 2), ("SGD", 2), ("SHP", 2), ("SLE", 2), ("SOS", 2),
    ("SRD", 2), ("SSP", 2), ("STN", 2), ("SVC", 2), ("SYP", 2), ("SZL", 2), ("THB", 2), ("TJS", 2),
    ("TMT", 2), ("TND", 3), ("TOP", 2), ("TRY", 2), ("TTD", 2), ("TWD", 2), ("TZS", 2), ("UAH", 2),
    ("UGX", 0), ("USD", 2), ("USN", 2), ("UYI", 0), ("UYU", 2), ("UYW", 4), ("UZS", 2), ("VED", 2),
    ("VES", 2), ("VND", 0), ("VUV", 0), ("WST", 2), ("XAD", 2), ("XAF", 0), ("XCD", 2), ("XCG", 2),
    ("XOF", 0), ("XPF", 0), ("YER", 2), ("ZAR", 2), ("ZMW", 2), ("ZWG", 2),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_every_code_is_found() {
        assert!(TABLE.is_sorted());
        for (code, minor_unit) in TABLE {
            assert!(code.len() == 3 && code.bytes().all(|b| b.is_ascii_uppercase()));
            let found = Currency::from_code(code).unwrap();
            assert_eq!((found.code(), found.minor_unit()), (*code, *minor_unit));
        }
    }

    #[test]
    fn the_schemas_list_these_codes() {
        let codes: Vec<&str> = TABLE.iter().map(|(code, _)| *code).collect();
        for schema in [
            include_str!("../../../docs/schemas/payment.schema.json"),
            include_str!("../../../docs/schemas/read-event.schema.json"),
            include_str!("../../../docs/schemas/email-event.schema.json"),
        ] {
            let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
            assert_eq!(schema["properties"]["currency"]["enum"], serde_json::json!(codes));
        }
    }

    /// Counted by minor unit in the list of 2026-01-01: 17, 139, 7, 2; and BGN.
    #[test]
    fn the_table_is_the_list_of_2026_and_bgn() {
        let count = |unit| TABLE.iter().filter(|(_, minor_unit)| *minor_unit == unit).count();
        assert_eq!([count(0), count(1), count(2), count(3), count(4)], [17, 0, 140, 7, 2]);
    }

    #[test]
    fn minor_units_are_those_of_the_list() {
        let cases = [
            ("EUR", 2),
            ("BGN", 2),
            ("XCG", 2),
            ("JPY", 0),
            ("ISK", 0),
            ("UYI", 0),
            ("KWD", 3),
            ("TND", 3),
            ("CLF", 4),
            ("UYW", 4),
            ("BOV", 2),
            ("CHE", 2),
            ("CHW", 2),
            ("COU", 2),
            ("MXV", 2),
            ("USN", 2),
            ("XAD", 2),
            ("XOF", 0),
            ("ZWG", 2),
            ("SLE", 2),
            ("VED", 2),
        ];
        for (code, unit) in cases {
            assert_eq!(Currency::from_code(code).map(Currency::minor_unit), Some(unit), "{code}");
        }
    }

    #[test]
    fn codes_without_minor_unit_withdrawn_codes_and_noise_are_refused() {
        for code in [
            "XAU",
            "XAG",
            "XPT",
            "XPD",
            "XDR",
            "XSU",
            "XUA",
            "XTS",
            "XXX",
            "XBA",
            "HRK",
            "ANG",
            "CUC",
            "SLL",
            "ZWL",
            "eur",
            "Eur",
            "EU",
            "EURO",
            "",
            " EUR",
            "978",
            "€€€",
            "ÄÖ",
            "\0\0\0",
        ] {
            assert_eq!(Currency::from_code(code), None, "{code:?}");
        }
    }
}
