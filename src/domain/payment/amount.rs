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
#[derive(Clone, Copy, PartialEq, Eq, Debug, strum::IntoStaticStr)]
pub enum AmountFault {
    /// Not a number by JSON's grammar (RFC 8259, section 6).
    #[strum(serialize = "is not a number by JSON's grammar")]
    NotANumber,
    /// Zero or less.
    #[strum(serialize = "is not above zero")]
    NotPositive,
    /// More than 14 integer digits.
    #[strum(serialize = "has more than 14 integer digits")]
    TooLarge,
    /// More decimal places than any currency has.
    #[strum(serialize = "has a digit beyond the currency's minor unit")]
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
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] | rest => (false, rest),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // Digits alone fail to parse only if they are too large.
    let value: i64 = std::str::from_utf8(digits).ok()?.parse().unwrap_or(i64::MAX);
    Some(if negative { -value } else { value })
}

#[cfg(test)]
mod tests;
