//! Currencies: ISO 4217 alphabetic codes that have a minor unit.
//!
//! Source: ISO 4217 "List one" as published on 2026-01-01 by its maintenance agency (SIX), every code whose
//! minor unit is a number. Funds codes (`CLF`, `UYW`, `BOV`, …) have one; metals, baskets and test codes
//! (`XAU`, `XDR`, `XTS`, `XXX`, …) have "N.A." and are not accepted. `BGN` left the list on that day, when
//! Bulgaria adopted the euro; it stays valid, because payments in it are still processed. An update may add
//! codes but must keep these, because the validity of a record must not change with a release.

use std::fmt;

/// A currency of the ISO 4217 list that has a minor unit.
#[derive(Clone, Copy)]
pub struct Currency(&'static Entry);

struct Entry {
    key: u32,
    code: &'static str,
    minor_unit: u8,
}

const fn key_of(a: u8, b: u8, c: u8) -> u32 {
    ((a as u32) << 16) | ((b as u32) << 8) | c as u32
}

/// The lookup key of a code; `None` if it does not have three bytes.
fn key(code: &[u8]) -> Option<u32> {
    match code {
        &[a, b, c] => Some(key_of(a, b, c)),
        _ => None,
    }
}

const fn of(code: &'static str, minor_unit: u8) -> Entry {
    let key = match code.as_bytes() {
        &[a, b, c] => key_of(a, b, c),
        _ => 0,
    };
    Entry { key, code, minor_unit }
}

/// Sorted by code, for the binary search.
#[rustfmt::skip]
static TABLE: [Entry; COUNT] = [
    of("AED", 2), of("AFN", 2), of("ALL", 2), of("AMD", 2), of("AOA", 2), of("ARS", 2), of("AUD", 2),
    of("AWG", 2), of("AZN", 2), of("BAM", 2), of("BBD", 2), of("BDT", 2), of("BGN", 2), of("BHD", 3),
    of("BIF", 0), of("BMD", 2), of("BND", 2), of("BOB", 2), of("BOV", 2), of("BRL", 2), of("BSD", 2),
    of("BTN", 2), of("BWP", 2), of("BYN", 2), of("BZD", 2), of("CAD", 2), of("CDF", 2), of("CHE", 2),
    of("CHF", 2), of("CHW", 2), of("CLF", 4), of("CLP", 0), of("CNY", 2), of("COP", 2), of("COU", 2),
    of("CRC", 2), of("CUP", 2), of("CVE", 2), of("CZK", 2), of("DJF", 0), of("DKK", 2), of("DOP", 2),
    of("DZD", 2), of("EGP", 2), of("ERN", 2), of("ETB", 2), of("EUR", 2), of("FJD", 2), of("FKP", 2),
    of("GBP", 2), of("GEL", 2), of("GHS", 2), of("GIP", 2), of("GMD", 2), of("GNF", 0), of("GTQ", 2),
    of("GYD", 2), of("HKD", 2), of("HNL", 2), of("HTG", 2), of("HUF", 2), of("IDR", 2), of("ILS", 2),
    of("INR", 2), of("IQD", 3), of("IRR", 2), of("ISK", 0), of("JMD", 2), of("JOD", 3), of("JPY", 0),
    of("KES", 2), of("KGS", 2), of("KHR", 2), of("KMF", 0), of("KPW", 2), of("KRW", 0), of("KWD", 3),
    of("KYD", 2), of("KZT", 2), of("LAK", 2), of("LBP", 2), of("LKR", 2), of("LRD", 2), of("LSL", 2),
    of("LYD", 3), of("MAD", 2), of("MDL", 2), of("MGA", 2), of("MKD", 2), of("MMK", 2), of("MNT", 2),
    of("MOP", 2), of("MRU", 2), of("MUR", 2), of("MVR", 2), of("MWK", 2), of("MXN", 2), of("MXV", 2),
    of("MYR", 2), of("MZN", 2), of("NAD", 2), of("NGN", 2), of("NIO", 2), of("NOK", 2), of("NPR", 2),
    of("NZD", 2), of("OMR", 3), of("PAB", 2), of("PEN", 2), of("PGK", 2), of("PHP", 2), of("PKR", 2),
    of("PLN", 2), of("PYG", 0), of("QAR", 2), of("RON", 2), of("RSD", 2), of("RUB", 2), of("RWF", 0),
    of("SAR", 2), of("SBD", 2), of("SCR", 2), of("SDG", 2), of("SEK", 2), of("SGD", 2), of("SHP", 2),
    of("SLE", 2), of("SOS", 2), of("SRD", 2), of("SSP", 2), of("STN", 2), of("SVC", 2), of("SYP", 2),
    of("SZL", 2), of("THB", 2), of("TJS", 2), of("TMT", 2), of("TND", 3), of("TOP", 2), of("TRY", 2),
    of("TTD", 2), of("TWD", 2), of("TZS", 2), of("UAH", 2), of("UGX", 0), of("USD", 2), of("USN", 2),
    of("UYI", 0), of("UYU", 2), of("UYW", 4), of("UZS", 2), of("VED", 2), of("VES", 2), of("VND", 0),
    of("VUV", 0), of("WST", 2), of("XAD", 2), of("XAF", 0), of("XCD", 2), of("XCG", 2), of("XOF", 0),
    of("XPF", 0), of("YER", 2), of("ZAR", 2), of("ZMW", 2), of("ZWG", 2),
];

/// Number of currencies.
const COUNT: usize = 166;

impl Currency {
    /// The currency with this upper-case alphabetic code; `None` if there is none with a minor unit.
    pub fn from_code(code: &str) -> Option<Self> {
        let key = key(code.as_bytes())?;
        let index = TABLE.binary_search_by_key(&key, |entry| entry.key).ok()?;
        TABLE.get(index).map(Currency)
    }

    /// All currencies, by code.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(Currency)
    }

    /// The three-letter code.
    pub fn code(self) -> &'static str {
        self.0.code
    }

    /// Decimal places of the minor unit: 2 for `EUR`, 0 for `JPY`, 3 for `KWD`, 4 for `CLF`.
    pub fn minor_unit(self) -> u8 {
        self.0.minor_unit
    }
}

impl PartialEq for Currency {
    fn eq(&self, other: &Self) -> bool {
        self.0.key == other.0.key
    }
}

impl Eq for Currency {}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.code)
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_every_code_is_found() {
        assert!(TABLE.windows(2).all(|w| w[0].key < w[1].key));
        for entry in &TABLE {
            assert_eq!(entry.code.len(), 3);
            assert!(entry.code.bytes().all(|b| b.is_ascii_uppercase()));
            assert_eq!(Currency::from_code(entry.code).unwrap().code(), entry.code);
        }
    }

    /// Counted by minor unit in the list of 2026-01-01: 17, 139, 7, 2; and BGN.
    #[test]
    fn the_table_is_the_list_of_2026_and_bgn() {
        let count = |unit| Currency::all().filter(|c| c.minor_unit() == unit).count();
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
