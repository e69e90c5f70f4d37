//! Amounts as exact decimals, never as floats.

use std::fmt;
use std::num::NonZeroU64;

use super::Currency;

/// Decimal places that an amount can have: the largest minor unit in ISO 4217 (`CLF`, `UYW`).
const PLACES_MAX: usize = 4;
/// Integer digits that an amount can have, by the contract. With four decimal places it fits into 64 bits.
const INTEGER_DIGITS_MAX: i64 = 14;
const ONE: u64 = 10_000;

/// An amount above zero and below 10^14, exact to four decimal places.
///
/// Two amounts are equal if they are the same number, whatever their notation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Amount(NonZeroU64);

/// Why a text is not a valid amount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AmountFault {
    /// Not a number by JSON's grammar (RFC 8259, section 6).
    NotANumber,
    /// Zero or less.
    NotPositive,
    /// More than 14 integer digits.
    TooLarge,
    /// More decimal places than any currency has.
    TooPrecise,
}

impl Amount {
    /// Parses a number in JSON's grammar, including an exponent. The time is linear in the length of the
    /// text, whatever the exponent is.
    ///
    /// # Errors
    /// See [`AmountFault`]. [`Amount::fits`] checks the currency's decimal places.
    pub fn parse(text: &str) -> Result<Self, AmountFault> {
        let number = Number::split(text.as_bytes()).ok_or(AmountFault::NotANumber)?;
        number.amount()
    }

    /// An amount from a number of 10^-4 units; `None` if it is zero, or 10^14 or more.
    pub fn from_ten_thousandths(count: u64) -> Option<Self> {
        if count / ONE >= 10u64.pow(INTEGER_DIGITS_MAX as u32) {
            return None;
        }
        NonZeroU64::new(count).map(Amount)
    }

    /// Whether all digits beyond the currency's minor unit are zero.
    pub fn fits(self, currency: Currency) -> bool {
        let count = self.0.get();
        // Constant divisors: a division by a variable takes as long as parsing the whole amount.
        match currency.minor_unit() {
            0 => count.is_multiple_of(10_000),
            1 => count.is_multiple_of(1_000),
            2 => count.is_multiple_of(100),
            3 => count.is_multiple_of(10),
            _ => true,
        }
    }

    /// The amount times 10^4. Its digits in base 10,000 are those of Postgres' `numeric`: the lowest is the
    /// fraction, those above are the integer part (weight 0 and up).
    pub fn ten_thousandths(self) -> u64 {
        self.0.get()
    }

    /// The amount times 10^6: the digits of `numeric(20,6)` without the decimal point.
    pub fn millionths(self) -> u128 {
        u128::from(self.0.get()).saturating_mul(100)
    }

    /// Appends the amount as a JSON number without an exponent, trailing zeros or a trailing point.
    pub fn write_to(self, out: &mut Vec<u8>) {
        let (integer, fraction) = (self.0.get() / ONE, self.0.get() % ONE);
        out.extend_from_slice(itoa::Buffer::new().format(integer).as_bytes());
        if fraction == 0 {
            return;
        }
        let digit = |unit: u64| b'0'.wrapping_add((fraction / unit % 10) as u8);
        let text = [b'.', digit(1_000), digit(100), digit(10), digit(1)];
        let zeros = text.iter().rev().take_while(|&&c| c == b'0').count();
        out.extend_from_slice(text.get(..text.len().saturating_sub(zeros)).unwrap_or_default());
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = Vec::with_capacity(20);
        self.write_to(&mut text);
        f.write_str(&String::from_utf8_lossy(&text))
    }
}

impl fmt::Debug for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Amount({self})")
    }
}

/// The parts of a number's text.
struct Number<'a> {
    negative: bool,
    integer: &'a [u8],
    fraction: &'a [u8],
    exponent: i64,
}

/// Splits the leading digits off.
fn digits(text: &[u8]) -> (&[u8], &[u8]) {
    let count = text.iter().take_while(|c| c.is_ascii_digit()).count();
    text.split_at_checked(count).unwrap_or_default()
}

impl<'a> Number<'a> {
    /// `None` if the text is not in JSON's grammar.
    fn split(text: &'a [u8]) -> Option<Self> {
        let (negative, text) = match text {
            [b'-', rest @ ..] => (true, rest),
            _ => (false, text),
        };
        let (integer, text) = digits(text);
        if integer.is_empty() || (integer.len() > 1 && integer.first() == Some(&b'0')) {
            return None;
        }
        let (fraction, text) = match text {
            [b'.', rest @ ..] => match digits(rest) {
                ([], _) => return None,
                parts => parts,
            },
            _ => (Default::default(), text),
        };
        let exponent = match text {
            [] => 0,
            [b'e' | b'E', rest @ ..] => exponent(rest)?,
            _ => return None,
        };
        Some(Number { negative, integer, fraction, exponent })
    }

    /// The number is `0.d1d2d3… * 10^point`, where d1 is the first digit that is not zero.
    fn amount(&self) -> Result<Amount, AmountFault> {
        let all = || self.integer.iter().chain(self.fraction);
        let length = self.integer.len().saturating_add(self.fraction.len());
        let leading = all().take_while(|&&d| d == b'0').count();
        if leading == length || self.negative {
            return Err(AmountFault::NotPositive);
        }
        let trailing = all().rev().take_while(|&&d| d == b'0').count();
        let significant = length.saturating_sub(leading).saturating_sub(trailing);
        // Lengths fit into i64; the exponent saturates far beyond what the digits of any text could offset.
        let point = (self.integer.len() as i64).saturating_sub(leading as i64).saturating_add(self.exponent);
        if point > INTEGER_DIGITS_MAX {
            return Err(AmountFault::TooLarge);
        }
        // Zeros to append to get a number of 10^-4 units.
        let padding = point.saturating_add(PLACES_MAX as i64).saturating_sub(significant as i64);
        let Some(scale) = u32::try_from(padding).ok().and_then(|p| 10u64.checked_pow(p)) else {
            return Err(AmountFault::TooPrecise);
        };
        let mantissa = all()
            .skip(leading)
            .take(significant)
            .fold(0u64, |sum, d| sum.wrapping_mul(10).wrapping_add(u64::from(d.wrapping_sub(b'0'))));
        NonZeroU64::new(mantissa.wrapping_mul(scale)).map(Amount).ok_or(AmountFault::NotPositive)
    }
}

/// Parses an optional sign and digits, saturating; `None` for other texts.
fn exponent(text: &[u8]) -> Option<i64> {
    let (negative, text) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        _ => (false, text),
    };
    if text.is_empty() {
        return None;
    }
    let mut value = 0i64;
    for c in text {
        if !c.is_ascii_digit() {
            return None;
        }
        value = value.saturating_mul(10).saturating_add(i64::from(c.wrapping_sub(b'0')));
    }
    Some(if negative { value.saturating_neg() } else { value })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(input: &str) -> Result<String, AmountFault> {
        Amount::parse(input).map(|a| a.to_string())
    }

    #[test]
    fn the_same_number_is_the_same_amount_however_written() {
        let ten_and_a_half = Amount::parse("10.5").unwrap();
        for same in ["10.50", "1.05E1", "1.05e+1", "105e-1", "10.500000000000", "0.00105E4", "1050000E-5"] {
            assert_eq!(Amount::parse(same), Ok(ten_and_a_half), "{same}");
        }
        assert_eq!(ten_and_a_half.ten_thousandths(), 105_000);
        assert_eq!(ten_and_a_half.millionths(), 10_500_000);
    }

    #[test]
    fn canonical_text_is_plain_and_without_trailing_zeros() {
        for (input, expected) in [
            ("1E+3", "1000"),
            ("123131.21", "123131.21"),
            ("0.10", "0.1"),
            ("5.0", "5"),
            ("0.0001", "0.0001"),
            ("100", "100"),
            ("1e13", "10000000000000"),
            ("99999999999999.9999", "99999999999999.9999"),
            ("100000000000000e-1", "10000000000000"),
            ("0.05", "0.05"),
            ("1.0203", "1.0203"),
        ] {
            assert_eq!(text(input).as_deref(), Ok(expected), "{input}");
        }
    }

    #[test]
    fn what_is_no_json_number_is_refused() {
        for input in [
            "", "-", "+1", "01", "00", ".5", "5.", "1e", "1e+", "1e-", "1.e3", "1 ", " 1", "0x10", "1_000",
            "1,5", "NaN", "Infinity", "1e5.0", "1ee5", "--1", "١", "1\0", "1.2.3",
        ] {
            assert_eq!(text(input), Err(AmountFault::NotANumber), "{input:?}");
        }
    }

    #[test]
    fn bounds_are_those_of_the_number_not_of_its_text() {
        for input in ["0", "-0", "0.00", "-1", "0e999999999999999999999", "-1e-99", "0e-5", "-1e400"] {
            assert_eq!(text(input), Err(AmountFault::NotPositive), "{input}");
        }
        for input in ["100000000000000", "1e14", "1e999999999999999999999999", "99999999999999999999999"] {
            assert_eq!(text(input), Err(AmountFault::TooLarge), "{input}");
        }
        for input in ["0.00001", "1.00001", "1e-5", "1e-99999999999999999999999", "99999999999999.99999"] {
            assert_eq!(text(input), Err(AmountFault::TooPrecise), "{input}");
        }
    }

    #[test]
    fn a_million_digits_and_the_exponent_that_undoes_them_are_read() {
        let small = format!("0.{}1E+1000001", "0".repeat(1_000_000));
        assert_eq!(text(&small).as_deref(), Ok("1"));
        let large = format!("1{}e-1000000", "0".repeat(1_000_000));
        assert_eq!(text(&large).as_deref(), Ok("1"));
        assert_eq!(text(&"9".repeat(1_000_000)), Err(AmountFault::TooLarge));
        assert_eq!(text(&format!("0.{}", "3".repeat(1_000_000))), Err(AmountFault::TooPrecise));
        assert_eq!(text(&format!("1e{}1", "0".repeat(100_000))).as_deref(), Ok("10"));
    }

    #[test]
    fn no_digit_but_zero_beyond_the_minor_unit() {
        let fits = |amount, code| Amount::parse(amount).unwrap().fits(Currency::from_code(code).unwrap());
        assert!(fits("1", "JPY") && fits("1.000", "JPY") && !fits("1.1", "JPY") && !fits("0.0001", "JPY"));
        assert!(fits("1.25", "EUR") && fits("1.2500", "EUR") && !fits("1.251", "EUR"));
        assert!(fits("1.251", "KWD") && !fits("1.2512", "KWD"));
        assert!(fits("1.2512", "CLF"));
    }

    #[test]
    fn ten_thousandths_keep_the_bounds() {
        assert_eq!(Amount::from_ten_thousandths(0), None);
        assert_eq!(Amount::from_ten_thousandths(1_000_000_000_000_000_000), None);
        let most = Amount::from_ten_thousandths(999_999_999_999_999_999).unwrap();
        assert_eq!(most.to_string(), "99999999999999.9999");
    }

    /// Moves the decimal point in a string of digits: slow, but simple enough to be obviously correct.
    fn oracle(integer: &str, fraction: &str, exponent: i32) -> Result<u64, AmountFault> {
        let mut digits = format!("{}{integer}", "0".repeat(60));
        let mut places = format!("{fraction}{}", "0".repeat(60));
        for _ in 0..exponent.max(0) {
            digits.push(places.remove(0));
            places.push('0');
        }
        for _ in exponent.min(0)..0 {
            places.insert(0, digits.pop().unwrap());
            digits.insert(0, '0');
        }
        let digits = digits.trim_start_matches('0');
        let places = places.trim_end_matches('0');
        if digits.is_empty() && places.is_empty() {
            Err(AmountFault::NotPositive)
        } else if digits.len() > 14 {
            Err(AmountFault::TooLarge)
        } else if places.len() > 4 {
            Err(AmountFault::TooPrecise)
        } else {
            Ok(format!("{digits}{places:0<4}").parse().unwrap())
        }
    }

    proptest! {
        #[test]
        fn amounts_are_those_of_a_naive_decimal(
            integer in "0|[1-9][0-9]{0,16}|[1-9]0{0,16}",
            fraction in "[0-9]{0,6}|[0-9]{0,3}0{0,12}",
            exponent in -30i32..30,
        ) {
            let point = if fraction.is_empty() { "" } else { "." };
            let parsed = Amount::parse(&format!("{integer}{point}{fraction}e{exponent}"));
            prop_assert_eq!(parsed.map(Amount::ten_thousandths), oracle(&integer, &fraction, exponent));
        }

        #[test]
        fn canonical_text_reads_back_as_itself(count in 1u64..1_000_000_000_000_000_000) {
            let amount = Amount::from_ten_thousandths(count).unwrap();
            let text = amount.to_string();
            prop_assert_eq!(Amount::parse(&text), Ok(amount));
            prop_assert!(!text.contains('.') || !text.ends_with(['0', '.']));
        }

        #[test]
        fn any_text_is_read_or_refused_without_a_panic(text in "[-+0-9.eE]{0,40}|.{0,20}") {
            let grammar = serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok()
                && text.starts_with(|c: char| c == '-' || c.is_ascii_digit())
                && !text.ends_with([' ', '\t', '\r', '\n']);
            prop_assert_eq!(Amount::parse(&text) != Err(AmountFault::NotANumber), grammar);
        }
    }
}
