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
    assert_eq!(ten_and_a_half.0.get(), 105_000);
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
        prop_assert_eq!(parsed.map(|amount| amount.0.get()), oracle(&integer, &fraction, exponent));
    }

    #[test]
    fn canonical_text_reads_back_as_itself(count in 1u64..1_000_000_000_000_000_000) {
        let amount = Amount(NonZeroU64::new(count).unwrap());
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
