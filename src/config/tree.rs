//! Nested tables of settings.

use config::{Map, Value, ValueKind};

/// Puts a value under `name` or `section.name`.
pub(super) fn insert(root: &mut Map<String, Value>, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            root.insert(key.to_owned(), value);
        }
        Some((section, name)) => {
            table(root, section).insert(name.to_owned(), value);
        }
    }
}

/// The table of this name; made where it is absent.
pub(super) fn table<'a>(parent: &'a mut Map<String, Value>, name: &str) -> &'a mut Map<String, Value> {
    static EMPTY: fn() -> ValueKind = || ValueKind::Table(Map::new());
    let entry = parent.entry(name.to_owned()).or_insert_with(|| Value::new(None, EMPTY()));
    loop {
        // A scalar in a table's place was reported when its layer was read.
        match entry.kind {
            ValueKind::Table(ref mut table) => return table,
            ref mut other => *other = EMPTY(),
        }
    }
}
