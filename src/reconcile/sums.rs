//! Exact sums of money per currency. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

/// Number of payments and total amount per currency.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sums(BTreeMap<String, Sum>);

/// Sum of one currency.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sum {
    /// Number of payments.
    pub count: u64,
    /// Total amount in millionths; 2^63 payments of the maximum amount fit.
    pub millionths: i128,
}

impl Sums {
    /// Adds a payment.
    pub fn add(&mut self, currency: &str, millionths: i128) {
        let one = Sum { count: 1, millionths };
        match self.0.get_mut(currency) {
            Some(sum) => sum.add(one),
            None => {
                self.0.insert(currency.to_owned(), one);
            }
        }
    }

    /// Adds other sums.
    pub fn merge(&mut self, other: &Self) {
        for (currency, sum) in &other.0 {
            self.0.entry(currency.clone()).or_default().add(*sum);
        }
    }

    /// Sum of this currency.
    pub fn of(&self, currency: &str) -> Sum {
        self.0.get(currency).copied().unwrap_or_default()
    }

    /// The currencies that occur.
    pub fn currencies(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

impl Sum {
    fn add(&mut self, other: Self) {
        self.count = self.count.saturating_add(other.count);
        self.millionths = self.millionths.saturating_add(other.millionths);
    }

    /// The total amount as a decimal number without trailing zeros.
    pub fn text(self) -> String {
        let (whole, rest) = (self.millionths / 1_000_000, self.millionths.unsigned_abs() % 1_000_000);
        let mut text = if self.millionths < 0 && whole == 0 { "-0".to_owned() } else { whole.to_string() };
        if rest > 0 {
            // Writing to a String cannot fail.
            let _ = write!(text, ".{rest:06}");
            text.truncate(text.trim_end_matches('0').len());
        }
        text
    }
}

/// Parses a binary `numeric` of Postgres into millionths; `None` if it is invalid, not finite, or has more
/// than six decimals. Format: `numeric_send` in the server's source.
pub fn numeric_millionths(bytes: &[u8]) -> Option<i128> {
    let mut words = bytes.chunks_exact(2).map(|w| match w {
        [high, low] => i16::from_be_bytes([*high, *low]),
        _ => 0,
    });
    let (count, weight, sign, _scale) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let is_negative = match sign.cast_unsigned() {
        0 => false,
        0x4000 => true,
        _ => return None,
    };
    // In units of 10^-8: two groups of four digits stand after the point.
    let mut units: i128 = 0;
    for index in 0..count {
        let digit = i128::from(words.next()?);
        let power = u32::try_from(i32::from(weight) - i32::from(index) + 2).ok()?;
        units = units.checked_add(digit.checked_mul(10_000_i128.checked_pow(power)?)?)?;
    }
    (units % 100 == 0).then_some(if is_negative { -units / 100 } else { units / 100 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::columns::RowWriter;

    #[test]
    fn an_amount_comes_back_from_its_row_as_it_went_in() {
        for millionths in [0_u128, 1, 100, 10_500_000, 99_999_999_999_999_999_900, 10_000_000_000, 1_234_500]
        {
            let mut row = Vec::new();
            RowWriter::start(&mut row, 1).numeric_millionths(millionths);
            // After the count of columns and the length of the field.
            assert_eq!(numeric_millionths(&row[6..]), Some(millionths as i128));
        }
        assert_eq!(numeric_millionths(&[0, 0, 0, 0, 0xC0, 0, 0, 0]), None, "NaN");
        assert_eq!(numeric_millionths(&[0, 1, 0, 0, 0x40, 0, 0, 0, 0, 7]), Some(-7_000_000));
        assert_eq!(numeric_millionths(&[0, 1]), None);
    }

    #[test]
    fn sums_keep_every_digit() {
        let mut sums = Sums::default();
        for _ in 0..1_000 {
            sums.add("CLF", 99_999_999_999_999_999_900);
            sums.add("KWD", 1_000);
        }
        let mut twice = sums.clone();
        twice.merge(&sums);
        assert_eq!(sums.of("CLF").text(), "99999999999999999.9");
        assert_eq!(twice.of("KWD"), Sum { count: 2_000, millionths: 2_000_000 });
        assert_eq!(twice.of("KWD").text(), "2");
        assert_eq!(Sum { count: 1, millionths: -500_000 }.text(), "-0.5");
        assert_eq!(Sum { count: 1, millionths: 10_000_001 }.text(), "10.000001");
    }
}
