//! Sizes as people write them: `16KiB`, `8MiB`, `512`.

use std::fmt;

const UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
    ("", 1),
];

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// So many bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The number of bytes, for sizes of things in memory.
    pub fn bytes(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }

    /// Reads digits and an optional unit: `KiB`, `MiB`, `GiB` (powers of 1024), `kB`, `MB`, `GB`
    /// (powers of 1000), `B`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(digits_end);
        let number: u64 = digits.parse().ok()?;
        let (_, factor) = UNITS.iter().find(|(name, _)| *name == unit.trim_start())?;
        number.checked_mul(*factor).map(Self)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, factor) in [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= factor && self.0.is_multiple_of(factor) {
                return write!(f, "{}{name}", self.0 / factor);
            }
        }
        write!(f, "{}B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let bytes = |text| ByteSize::parse(text).map(ByteSize::bytes);
        assert_eq!(bytes("16KiB"), Some(16_384));
        assert_eq!(bytes("8 MiB"), Some(8 << 20));
        assert_eq!(bytes("1MB"), Some(1_000_000));
        assert_eq!(bytes("512"), Some(512));
        assert_eq!(bytes("7B"), Some(7));
        for wrong in ["", "KiB", "1.5MiB", "-1", "8Mib", "8 M", "99999999999GiB"] {
            assert_eq!(bytes(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_shown_size_reads_back_as_itself() {
        for size in [0, 1, 1023, 1024, 1500, 16 << 10, 8 << 20, 3 << 30] {
            let size = ByteSize::from_bytes(size);
            assert_eq!(ByteSize::parse(&size.to_string()), Some(size));
        }
    }
}
