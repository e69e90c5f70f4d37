use std::collections::{BTreeMap, BTreeSet};

use rdkafka_sys::types::RDKafkaRespErr;
use strum::VariantArray;

use super::*;

#[test]
fn a_code_that_no_line_names_never_passes_by_itself() {
    for code in ["42P01", "42501", "28P01", "XX000", "3D000", "", "zz", "2"] {
        assert_eq!(class_of_sqlstate(code, None), FailureClass::Persistent, "{code}");
    }
    assert_eq!(class_of_kafka(Code::Unknown), FailureClass::Persistent);
}

#[test]
fn what_goes_away_by_itself_is_waited_for() {
    for code in ["08006", "40001", "40P01", "53100", "53300", "57P01", "57P03", "25006", "55P03"] {
        assert_eq!(class_of_sqlstate(code, None), FailureClass::Transient, "{code}");
    }
    assert_eq!(class_of_sqlstate(SQLSTATE_CURSOR_MOVED, None), FailureClass::Fenced);
}

#[test]
fn a_row_is_suspected_only_where_a_row_can_be_at_fault() {
    for code in ["22001", "22003", "22021", "22P05", "23502", "23505", "23P01", "54000", "P0001"] {
        assert_eq!(class_of_sqlstate(code, None), FailureClass::Record, "{code}");
    }
    assert_eq!(class_of_sqlstate("23514", Some("a_check")), FailureClass::Record);
    assert_eq!(class_of_sqlstate("23514", None), FailureClass::Persistent, "no partition for the row");
    assert_eq!(class_of_sqlstate("22P04", None), FailureClass::Persistent, "the table has other columns");
}

/// The tables of docs/reference/failures.md: the cells of each row, without the header.
fn tables() -> [Vec<[String; 3]>; 3] {
    let page = include_str!("../../../../docs/reference/failures.md");
    let mut tables: Vec<Vec<[String; 3]>> = Vec::new();
    for line in page.lines().filter(|line| line.starts_with('|')) {
        let mut cells = line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned());
        let mut cell = || cells.next().unwrap_or_default();
        let row = [cell(), cell(), cell()];
        match row[0].as_str() {
            "class" | "SQLSTATE" | "code" => tables.push(Vec::new()),
            "-" => {}
            _ => tables.last_mut().unwrap().push(row),
        }
    }
    tables.try_into().unwrap()
}

/// The codes of a table with their classes, and the class of every other code.
fn classes(table: &[[String; 3]]) -> (BTreeMap<&str, &str>, &str) {
    let (other, named) = table.split_last().unwrap();
    assert_eq!((other[0].as_str(), other[2].as_str()), ("every other", ""));
    let mut classes = BTreeMap::new();
    for [codes, class, meaning] in named {
        assert!(!meaning.is_empty(), "{codes}");
        for code in codes.split(", ") {
            assert_eq!(classes.insert(code, class.as_str()), None, "{code} is there twice");
        }
    }
    (classes, &other[1])
}

#[test]
fn the_documentation_explains_each_class() {
    let [table, ..] = tables();
    let documented: Vec<&str> = table.iter().map(|[class, ..]| class.as_str()).collect();
    let mut known: Vec<&str> = FailureClass::VARIANTS.iter().map(|class| class.as_str()).collect();
    // Two classes have the label `record`.
    known.dedup();
    assert_eq!(documented, known);
    assert!(table.iter().all(|[_, policy, _]| !policy.is_empty()));
}

#[test]
fn the_documentation_has_the_class_of_every_sqlstate() {
    let [_, table, _] = tables();
    let (named, other) = classes(&table);
    let documented = |code: &str| {
        let of_class = format!("{}xxx", &code[..2]);
        *named.get(code).or_else(|| named.get(&*of_class)).unwrap_or(&other)
    };
    let others = ["00", "01", "0A", "28", "3D", "42", "55", "F0", "HV", "XX"];
    let known: BTreeSet<&str> = named.keys().map(|code| &code[..2]).chain(others).collect();
    let mut found = 0;
    // Codes end with digits, and those of Postgres' own with a P and digits.
    for class in known {
        for rest in (0..1_000).map(|n| format!("{n:03}")).chain((0..100).map(|n| format!("P{n:02}"))) {
            let code = format!("{class}{rest}");
            assert_eq!(class_of_sqlstate(&code, Some("a_check")).as_str(), documented(&code), "{code}");
            found += usize::from(named.contains_key(&*code));
        }
    }
    let exact = named.keys().filter(|code| !code.ends_with("xxx")).count();
    assert_eq!(found, exact, "every documented code was compared");
}

#[test]
fn the_documentation_has_the_class_of_every_kafka_code() {
    let [.., table] = tables();
    let (mut named, other) = classes(&table);
    for code in (-300..300).filter_map(|n| RDKafkaRespErr::try_from(n).ok()).map(Code::from) {
        let documented = named.remove(&*format!("{code:?}")).unwrap_or(other);
        assert_eq!(class_of_kafka(code).as_str(), documented, "{code:?}");
    }
    assert_eq!(named, BTreeMap::new(), "codes that the client library does not have");
}
