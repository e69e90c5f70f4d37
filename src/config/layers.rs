//! The layers that settings come from, each checked for unknown names before they are merged.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use config::{File, FileFormat, Map, Source, Value, ValueKind};

use super::origin::Origin;
use super::problem::Problem;
use super::schema;
use super::tree::{insert, table};

/// What every environment variable of ours begins with. Two underscores, so that the variables
/// which container platforms make up for a service of this name are not mistaken for settings.
pub(super) const PREFIX: &str = "PAYMENT_WRITER__";

/// One layer, ready for the `config` crate's builder.
#[derive(Clone, Debug, Default)]
pub(super) struct Layer {
    pub(super) values: Map<String, Value>,
}

impl Source for Layer {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Value>, config::ConfigError> {
        Ok(self.values.clone())
    }
}

fn insert_property(root: &mut Map<String, Value>, name: String, value: Value) {
    table(table(root, "kafka"), "properties").insert(name, value);
}

/// Reads the text of a settings file.
pub(super) fn file(path: &Path, text: &str, problems: &mut Vec<Problem>) -> Layer {
    let parsed = match File::from_str(text, FileFormat::Toml).collect() {
        Ok(parsed) => parsed,
        Err(error) => {
            problems.push(not_toml(path, text, &error));
            return Layer::default();
        }
    };
    let origin = Origin::File(path.to_path_buf());
    let mut walk = Walk { origin: &origin, layer: Layer::default(), problems };
    for (name, value) in sorted(parsed) {
        match value.kind {
            ValueKind::Table(table) if schema::is_section(&name) => walk.section(&name, table),
            kind => walk.setting(&name, kind),
        }
    }
    walk.layer
}

/// The parser's own rendering shows the line, and with it a password; its message does not.
fn not_toml(path: &Path, text: &str, error: &config::ConfigError) -> Problem {
    let cause = match error {
        config::ConfigError::FileParse { cause, .. } => cause.downcast_ref::<toml::de::Error>(),
        _ => None,
    };
    let line = cause.and_then(toml::de::Error::span).and_then(|span| {
        let before = text.get(..span.start)?;
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let column = before.get(line_start..)?.chars().count() + 1;
        Some((before.matches('\n').count() + 1, column))
    });
    let reason = cause.map_or("a value is out of range", toml::de::Error::message).replace('\n', ", ");
    Problem::NotToml { path: path.to_path_buf(), line, reason }
}

struct Walk<'a> {
    origin: &'a Origin,
    layer: Layer,
    problems: &'a mut Vec<Problem>,
}

impl Walk<'_> {
    fn section(&mut self, section: &str, table: Map<String, Value>) {
        for (name, value) in sorted(table) {
            let key = format!("{section}.{name}");
            if key == schema::PROPERTIES {
                self.properties(value.kind);
            } else {
                self.setting(&key, value.kind);
            }
        }
    }

    fn setting(&mut self, key: &str, kind: ValueKind) {
        if schema::find(key).is_some() {
            let value = Value::new(self.origin.tag().as_ref(), retag(kind, self.origin));
            insert(&mut self.layer.values, key, value);
        } else if schema::is_section(key) {
            self.problems.push(Problem::Invalid {
                key: key.to_owned(),
                value: None,
                origin: self.origin.clone(),
                rule: "must be a table of settings".to_owned(),
            });
        } else {
            self.problems.push(Problem::Unknown {
                name: key.to_owned(),
                origin: self.origin.clone(),
                nearest: schema::nearest(key).to_owned(),
            });
        }
    }

    fn properties(&mut self, kind: ValueKind) {
        match kind {
            ValueKind::Table(table) => self.property_table("", table),
            _ => self.problems.push(Problem::Invalid {
                key: schema::PROPERTIES.to_owned(),
                value: None,
                origin: self.origin.clone(),
                rule: "must be a table of librdkafka properties".to_owned(),
            }),
        }
    }

    /// `security.protocol = "SSL"` without quotes is a table within a table for TOML, and means
    /// the same as with quotes.
    fn property_table(&mut self, prefix: &str, table: Map<String, Value>) {
        for (name, value) in sorted(table) {
            let name = format!("{prefix}{name}");
            match value.kind {
                ValueKind::Table(inner) => self.property_table(&format!("{name}."), inner),
                kind => {
                    let value = Value::new(self.origin.tag().as_ref(), kind);
                    insert_property(&mut self.layer.values, name, value);
                }
            }
        }
    }
}

fn sorted(table: Map<String, Value>) -> BTreeMap<String, Value> {
    table.into_iter().collect()
}

fn retag(kind: ValueKind, origin: &Origin) -> ValueKind {
    match kind {
        ValueKind::Array(items) => ValueKind::Array(
            items.into_iter().map(|item| Value::new(origin.tag().as_ref(), item.kind)).collect(),
        ),
        other => other,
    }
}

/// Reads the variables that begin with [`PREFIX`]: `__` stands between the parts of a name, and
/// `_` in the name of a librdkafka property stands for its dots.
pub(super) fn environment(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
    problems: &mut Vec<Problem>,
) -> Layer {
    let mut layer = Layer::default();
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let ours: BTreeMap<String, OsString> = variables
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    for (variable, value) in ours {
        let parts = variable.strip_prefix(PREFIX).unwrap_or_default().to_ascii_lowercase();
        let key = parts.replace("__", ".");
        let origin = Origin::Environment(variable.clone());
        let property = key.strip_prefix("kafka.properties.").map(|name| name.replace('_', "."));
        if property.is_none() && schema::find(&key).is_none_or(|spec| spec.key == schema::PROPERTIES) {
            problems.push(unknown_variable(&key, variable, origin));
            continue;
        }
        let canonical = property.as_ref().map_or_else(|| key.clone(), |name| property_key(name));
        if let Some(first) = seen.insert(canonical.clone(), variable.clone()) {
            problems.push(Problem::Twice { key: canonical, first, second: variable });
            continue;
        }
        let Ok(text) = value.into_string() else {
            let rule = "must be valid UTF-8".to_owned();
            problems.push(Problem::Invalid { key: canonical, value: None, origin, rule });
            continue;
        };
        let value = Value::new(origin.tag().as_ref(), text);
        match property {
            Some(name) => insert_property(&mut layer.values, name, value),
            None => insert(&mut layer.values, &key, value),
        }
    }
    layer
}

/// The full name of a librdkafka property among the settings.
pub(super) fn property_key(name: &str) -> String {
    format!("{}.\"{name}\"", schema::PROPERTIES)
}

fn unknown_variable(key: &str, variable: String, origin: Origin) -> Problem {
    if key == schema::PROPERTIES || schema::is_section(key) {
        return Problem::Invalid {
            key: key.to_owned(),
            value: None,
            origin,
            rule: format!("must be given one by one, as {variable}__NAME"),
        };
    }
    let nearest = schema::nearest(key);
    Problem::Unknown { name: variable, origin, nearest: variable_of(nearest) }
}

/// The environment variable of a setting.
pub(super) fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}
