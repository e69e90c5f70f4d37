//! docs/reference/settings.md: keys and defaults as `config show` prints them, meaning and limits from the
//! comments in the shipped file. The limits are checked with `check-config`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::process::Command;

use serde_json::Value;

use super::generated::{self, repository};

/// A setting's comment in the shipped file.
struct Comment {
    meaning: String,
    /// The default, if it is not the value in the file.
    default: Option<String>,
    /// Such as `Integer`.
    kind: String,
    unit: String,
    limits: String,
}

impl Comment {
    /// The last line is the type, with unit and limits: `Integer, records: 1 to 100000.`
    fn parse(key: &str, lines: &[String]) -> Self {
        let (facts, meaning) = lines.split_last().unwrap_or_else(|| panic!("{key} has no comment"));
        let facts = facts.strip_suffix('.').unwrap_or_else(|| panic!("{key}: {facts}"));
        let (kind, limits) = facts.split_once(": ").unwrap_or((facts, ""));
        let (kind, unit) = kind.split_once(", ").unwrap_or((kind, ""));
        let mut meaning = meaning.join(" ");
        let mut default = None;
        if let Some((before, after)) = meaning.clone().split_once(" Default: ") {
            default = Some(after.trim_end_matches('.').to_owned());
            meaning = before.to_owned();
        }
        assert!(!meaning.is_empty(), "{key} has no description");
        Self { meaning, default, kind: kind.into(), unit: unit.into(), limits: limits.into() }
    }

    /// The two ends of `1 to 32`.
    fn range(&self) -> Option<(&str, &str)> {
        let is_quantity = ["Integer", "Number", "Duration", "Size"].contains(&self.kind.as_str());
        is_quantity.then(|| self.limits.split_once(" to ").unwrap())
    }

    fn fits(&self, value: &Value) -> bool {
        match self.kind.as_str() {
            "Text" => value.is_string(),
            "Boolean" => value.is_boolean(),
            "Integer" => value.is_i64(),
            "Number" => value.is_f64(),
            "Duration" => {
                value.as_str().is_some_and(|text| ["ms", "s", "m", "h", "d"].contains(&split(text).1))
            }
            "Size" => value.as_str().is_some_and(|text| ["B", "KiB", "MiB"].contains(&split(text).1)),
            "List of texts" => value.as_array().is_some_and(|items| items.iter().all(Value::is_string)),
            "List of integers" => value.as_array().is_some_and(|items| items.iter().all(Value::is_i64)),
            "Table" => value.is_object(),
            other => panic!("{other} is not a type"),
        }
    }
}

/// `5ms` as 5 and `ms`.
fn split(quantity: &str) -> (u64, &str) {
    let at = quantity.find(|c: char| !c.is_ascii_digit()).unwrap_or(quantity.len());
    (quantity[..at].parse().unwrap(), &quantity[at..])
}

/// The comment above each setting of the shipped file; a setting without a value there is commented out.
fn comments() -> BTreeMap<String, Comment> {
    let text = fs::read_to_string(repository().join("config/payment-writer.toml")).unwrap();
    let (mut section, mut lines) = (String::new(), Vec::new());
    let mut comments = BTreeMap::new();
    let is_key = |name: &str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    for line in text.lines() {
        let bare = line.strip_prefix("# ").unwrap_or(line);
        if let Some(name) = line.strip_prefix('[') {
            section = format!("{}.", name.trim_end_matches(']'));
            if !lines.is_empty() {
                let key = section.trim_end_matches('.').to_owned();
                comments.insert(key.clone(), Comment::parse(&key, &lines));
            }
            lines.clear();
        } else if let Some((name, _)) = bare.split_once(" = ").filter(|(name, _)| is_key(name)) {
            let key = format!("{section}{name}");
            comments.insert(key.clone(), Comment::parse(&key, &lines));
            lines.clear();
        } else if let Some(comment) = line.strip_prefix("# ") {
            lines.push(comment.to_owned());
        } else {
            lines.clear();
        }
    }
    comments
}

/// Runs the program with a single setting.
fn program(arguments: &[&str], setting: Option<(&str, &str)>) -> std::process::Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_payment-writer"));
    command.args(arguments).env_clear().current_dir(folder.path());
    if let Some((key, value)) = setting {
        command.env(format!("PAYMENT_WRITER__{}", key.to_uppercase().replace('.', "__")), value);
    }
    command.output().unwrap()
}

/// Key and default of each setting, in the order of the program.
pub fn defaults() -> Vec<(String, Value)> {
    let output = program(&["config", "show", "--json"], None);
    assert!(output.status.success(), "{output:?}");
    let shown: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    shown.iter().map(|entry| (entry["key"].as_str().unwrap().to_owned(), entry["value"].clone())).collect()
}

#[test]
fn the_settings_page_matches_the_program_and_its_file() {
    let comments = comments();
    let mut table =
        String::from("| key | type | default | limits | unit | meaning |\n| - | - | - | - | - | - |\n");
    let defaults = defaults();
    for (key, value) in &defaults {
        let comment = comments.get(key).unwrap_or_else(|| panic!("{key} has no comment in the shipped file"));
        assert!(comment.fits(value), "{key} is {value}, and no {}", comment.kind);
        let default = match (&comment.default, value) {
            (Some(text), _) => text.clone(),
            (None, Value::Array(items)) if items.is_empty() => "empty".to_owned(),
            (None, Value::Object(items)) if items.is_empty() => "empty".to_owned(),
            (None, Value::String(text)) if text.is_empty() => "empty".to_owned(),
            (None, Value::String(text)) => format!("`{text}`"),
            (None, value) => format!("`{value}`"),
        };
        let unit = match comment.kind.as_str() {
            "Duration" => "`ms`, `s`, `m`, `h`, `d`",
            "Size" => "`B`, `KiB`, `MiB`",
            _ => &comment.unit,
        };
        let kind = comment.kind.to_lowercase();
        let cells = [&format!("`{key}`"), &kind, &default, &comment.limits, unit, &comment.meaning];
        let cells = cells.map(|cell| cell.replace('|', "\\|"));
        writeln!(table, "| {} |", cells.join(" | ")).unwrap();
    }
    let unknown: Vec<_> = comments.keys().filter(|key| !defaults.iter().any(|(k, _)| k == *key)).collect();
    assert!(unknown.is_empty(), "the shipped file has {unknown:?}");
    generated::check("docs/reference/settings.md", &table);
}

#[test]
fn the_limits_that_the_settings_file_names_are_those_of_the_program() {
    /// The next smaller unit, and how many of it make one.
    const SMALLER: [(&str, &str, u64); 6] = [
        ("s", "ms", 1_000),
        ("m", "s", 60),
        ("h", "m", 60),
        ("d", "h", 24),
        ("KiB", "B", 1_024),
        ("MiB", "KiB", 1_024),
    ];
    let is_taken = |key: &str, value: &str| {
        let output = program(&["check-config"], Some((key, value)));
        assert!([Some(0), Some(2)].contains(&output.status.code()), "{key} = {value}: {output:?}");
        output.status.success()
    };
    let mut tried = 0;
    for (key, comment) in comments() {
        let Some((low, high)) = comment.range() else { continue };
        let (below, above) = match comment.kind.as_str() {
            "Integer" => {
                let [low, high] = [low, high].map(|bound| bound.parse::<i64>().unwrap());
                (Some((low - 1).to_string()), (high + 1).to_string())
            }
            "Number" => (Some(format!("-{low}01")), format!("{high}01")),
            _ => {
                let (number, unit) = split(low);
                let below = match SMALLER.iter().find(|(larger, ..)| *larger == unit) {
                    _ if number == 0 => None,
                    Some((_, smaller, count)) => Some(format!("{}{smaller}", number * count - 1)),
                    None => Some(format!("{}{unit}", number - 1)),
                };
                let (number, unit) = split(high);
                (below, format!("{}{unit}", number + 1))
            }
        };
        assert!(is_taken(&key, low) && is_taken(&key, high), "{key} does not accept {}", comment.limits);
        for outside in below.iter().chain([&above]) {
            assert!(!is_taken(&key, outside), "{key} takes {outside}, documented is {}", comment.limits);
        }
        tried += 1;
    }
    assert!(tried >= 10, "{tried}");
}
