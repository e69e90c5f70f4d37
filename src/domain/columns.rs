//! Encodes rows for `COPY … (FORMAT binary)` and arrays as bind parameters, directly from the payment.
//!
//! Formats: PostgreSQL manual, "COPY", section "Binary Format"; `numeric_send`, `array_send` and
//! `timestamptz_send` in the server's sources.

use std::fmt;

use bytes::{BufMut, BytesMut};
use tokio_postgres::types::{IsNull, ToSql, Type, to_sql_checked};

use crate::domain::record::TimestampMs;

/// Header of a binary COPY: signature, no flags, no header extension.
pub const COPY_HEADER: &[u8] = b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// Trailer of a binary COPY: a field count of -1.
pub const COPY_TRAILER: &[u8] = &[0xff, 0xff];

/// Microseconds from 1970-01-01 to 2000-01-01, Postgres's epoch.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;
/// `numeric(20,6)`: the scale of `payment_core.amount`.
const AMOUNT_SCALE: u16 = 6;

/// Converts a timestamp to Postgres's: microseconds since 2000-01-01 UTC.
pub fn postgres_timestamp(at: TimestampMs) -> i64 {
    at.0.saturating_mul(1_000).saturating_sub(POSTGRES_EPOCH_US)
}

/// The inverse of [`postgres_timestamp`], rounded down to milliseconds.
pub fn from_postgres_timestamp(us: i64) -> TimestampMs {
    TimestampMs(us.saturating_add(POSTGRES_EPOCH_US).div_euclid(1_000))
}

/// Appends one row to a buffer.
pub struct RowWriter<'b> {
    out: &'b mut Vec<u8>,
}

impl<'b> RowWriter<'b> {
    /// Starts a row of `columns` columns; each column must then be written once, in order.
    pub fn start(out: &'b mut Vec<u8>, columns: i16) -> Self {
        out.extend_from_slice(&columns.to_be_bytes());
        Self { out }
    }

    fn field(&mut self, bytes: &[u8]) -> &mut Self {
        self.out.extend_from_slice(&(bytes.len() as i32).to_be_bytes());
        self.out.extend_from_slice(bytes);
        self
    }

    /// `uuid`
    pub fn uuid(&mut self, value: &[u8; 16]) -> &mut Self {
        self.field(value)
    }

    /// `bigint`
    pub fn bigint(&mut self, value: i64) -> &mut Self {
        self.field(&value.to_be_bytes())
    }

    /// `integer`
    pub fn integer(&mut self, value: i32) -> &mut Self {
        self.field(&value.to_be_bytes())
    }

    /// `smallint`
    pub fn smallint(&mut self, value: i16) -> &mut Self {
        self.field(&value.to_be_bytes())
    }

    /// `timestamptz`
    pub fn timestamptz(&mut self, value: TimestampMs) -> &mut Self {
        self.bigint(postgres_timestamp(value))
    }

    /// `date`, as days since 2000-01-01.
    pub fn date(&mut self, days: i32) -> &mut Self {
        self.integer(days)
    }

    /// `text`, or null.
    pub fn text(&mut self, value: Option<&str>) -> &mut Self {
        match value {
            Some(text) => self.field(text.as_bytes()),
            None => {
                self.out.extend_from_slice(&(-1_i32).to_be_bytes());
                self
            }
        }
    }

    /// `numeric` with six decimals from a value in millionths.
    pub fn numeric_millionths(&mut self, millionths: u128) -> &mut Self {
        // Two base-10000 digits follow the decimal point, so scale to eight decimals first.
        let mut rest = millionths.saturating_mul(100);
        let mut digits = [0_u16; 12];
        let mut count = 0;
        for slot in digits.iter_mut().rev() {
            if rest == 0 {
                break;
            }
            *slot = (rest % 10_000) as u16;
            rest /= 10_000;
            count += 1;
        }
        let used = digits.get(digits.len() - count..).unwrap_or_default();
        // Weight of the first digit, counted from the last one, whose weight is -2.
        let weight = count as i16 - 3;
        let trailing_zeros = used.iter().rev().take_while(|d| **d == 0).count();
        let stored = used.get(..count - trailing_zeros).unwrap_or_default();
        let weight = if stored.is_empty() { 0 } else { weight };
        self.out.extend_from_slice(&(8 + 2 * stored.len() as i32).to_be_bytes());
        self.out.extend_from_slice(&(stored.len() as i16).to_be_bytes());
        self.out.extend_from_slice(&weight.to_be_bytes());
        self.out.extend_from_slice(&0_u16.to_be_bytes());
        self.out.extend_from_slice(&AMOUNT_SCALE.to_be_bytes());
        for digit in stored {
            self.out.extend_from_slice(&digit.to_be_bytes());
        }
        self
    }
}

/// A one-dimensional array parameter whose elements are encoded when they are added.
#[derive(Clone, Default)]
pub struct ArrayParam {
    elements: Vec<u8>,
    len: i32,
}

/// Omits the elements: tokio-postgres logs the parameters of every statement at level debug, and these hold
/// payment data.
impl fmt::Debug for ArrayParam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ArrayParam({} elements)", self.len)
    }
}

impl ArrayParam {
    /// An empty array with room for `elements` elements of `size` bytes.
    pub fn with_capacity(elements: usize, size: usize) -> Self {
        Self { elements: Vec::with_capacity(elements.saturating_mul(size.saturating_add(4))), len: 0 }
    }

    /// Appends one element in its binary form.
    pub fn push(&mut self, element: &[u8]) {
        self.elements.extend_from_slice(&(element.len() as i32).to_be_bytes());
        self.elements.extend_from_slice(element);
        self.len += 1;
    }
}

impl ToSql for ArrayParam {
    fn to_sql(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        let element = match ty.kind() {
            tokio_postgres::types::Kind::Array(element) => element.oid(),
            _ => return Err("an array parameter is bound to a type that is not an array".into()),
        };
        out.reserve(self.elements.len() + 20);
        out.put_i32(1); // dimensions
        out.put_i32(0); // no nulls
        out.put_u32(element);
        out.put_i32(self.len);
        out.put_i32(1); // lower bound
        out.extend_from_slice(&self.elements);
        Ok(IsNull::No)
    }

    fn accepts(ty: &Type) -> bool {
        matches!(ty.kind(), tokio_postgres::types::Kind::Array(_))
    }

    to_sql_checked!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads a binary numeric back: value in millionths.
    fn decode(field: &[u8]) -> u128 {
        let word = |i: usize| i16::from_be_bytes([field[2 * i], field[2 * i + 1]]);
        let (count, weight, sign, scale) = (word(0), word(1), word(2), word(3));
        assert_eq!((sign, scale), (0, 6));
        let mut value = 0_u128;
        for i in 0..count {
            let power = weight - i + 2; // relative to eight decimals
            value += word(4 + i as usize) as u128 * 10_000_u128.pow(power as u32);
        }
        assert_eq!(value % 100, 0);
        value / 100
    }

    proptest! {
        #[test]
        fn a_numeric_keeps_every_digit(value in 0_u128..100_000_000_000_000_000_000) {
            let mut out = Vec::new();
            RowWriter { out: &mut out }.numeric_millionths(value);
            let len = i32::from_be_bytes(out[..4].try_into().unwrap()) as usize;
            prop_assert_eq!(len, out.len() - 4);
            prop_assert_eq!(decode(&out[4..]), value);
            // No leading or trailing zero digit, as the server's own output has none.
            if value > 0 {
                prop_assert!(out[12..14] != [0, 0] && out[out.len() - 2..] != [0, 0]);
            }
        }

        #[test]
        fn timestamps_survive(ms in -62_000_000_000_000_i64..253_000_000_000_000) {
            prop_assert_eq!(from_postgres_timestamp(postgres_timestamp(TimestampMs(ms))), TimestampMs(ms));
        }
    }

    #[test]
    fn a_row_is_laid_out_as_the_manual_says() {
        let mut out = Vec::new();
        RowWriter::start(&mut out, 3).integer(7).text(None).text(Some("ab"));
        assert_eq!(out, [0, 3, 0, 0, 0, 4, 0, 0, 0, 7, 255, 255, 255, 255, 0, 0, 0, 2, b'a', b'b']);
        assert_eq!(COPY_HEADER.len(), 19);
    }
}
