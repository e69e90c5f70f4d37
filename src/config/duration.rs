//! Durations as people write them: `5ms`, `30s`, `7d`, `1h 30m`.

use std::time::Duration;

/// Reads one or more numbers with units. A bare number is refused: nobody can see its unit.
pub fn parse(text: &str) -> Option<Duration> {
    if text.trim() == "0" {
        return Some(Duration::ZERO);
    }
    humantime::parse_duration(text.trim()).ok()
}

/// Writes a duration in its largest whole unit, so that [`parse`] reads the same back.
pub fn format(duration: Duration) -> String {
    if duration.is_zero() {
        return "0s".to_owned();
    }
    let nanos = duration.as_nanos();
    let units: [(&str, u128); 6] = [
        ("d", 86_400_000_000_000),
        ("h", 3_600_000_000_000),
        ("m", 60_000_000_000),
        ("s", 1_000_000_000),
        ("ms", 1_000_000),
        ("us", 1_000),
    ];
    units
        .iter()
        .find(|(_, unit)| nanos.is_multiple_of(*unit))
        .map_or_else(|| format!("{nanos}ns"), |(name, unit)| format!("{}{name}", nanos / unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_people_write_them() {
        assert_eq!(parse("7d"), Some(Duration::from_secs(7 * 86_400)));
        assert_eq!(parse("5ms"), Some(Duration::from_millis(5)));
        assert_eq!(parse("1h 30m"), Some(Duration::from_secs(5_400)));
        assert_eq!(parse("0"), Some(Duration::ZERO));
        for wrong in ["", "5", "-1s", "five", "1 fortnight"] {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn a_shown_duration_reads_back_as_itself() {
        for (millis, shown) in [(5, "5ms"), (30_000, "30s"), (604_800_000, "7d"), (5_400_000, "90m")] {
            let duration = Duration::from_millis(millis);
            assert_eq!(format(duration), shown);
            assert_eq!(parse(shown), Some(duration));
        }
    }
}
