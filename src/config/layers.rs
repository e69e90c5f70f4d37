//! The layers that settings come from: the defaults, the settings file, the environment.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;

use serde_json::{Map, Value};

use super::origin::{Effective, Origin};
use super::properties::{HIDDEN, PROPERTIES, is_secret, property_key};
use super::sections::Settings;

/// The shipped settings file sets every setting to its default, except two that have none of their own.
const SHIPPED: &str = include_str!("../../config/payment-writer.toml");
/// By default the same as [`URL`].
const HOUSEKEEPING_URL: &str = "postgres.housekeeping_url";
const URL: &str = "postgres.url";
/// Prefix of environment variables. Container platforms set variables such as `PAYMENT_WRITER_SERVICE_HOST`
/// for a service of this name; the second underscore tells them from settings.
const PREFIX: &str = "PAYMENT_WRITER__";

/// The merged layers, and everything that is wrong with them.
pub(super) struct Layers {
    defaults: Vec<Effective>,
    /// In the order of the shipped file.
    settings: Vec<Effective>,
    /// librdkafka's properties by name.
    properties: BTreeMap<String, Effective>,
    pub(super) problems: Vec<String>,
}

impl Layers {
    pub(super) fn defaults() -> Self {
        let with_origin = |(key, value)| Effective { key, value, origin: Origin::Default };
        let shipped = flattened(SHIPPED.parse().unwrap_or_default());
        let mut defaults: Vec<Effective> = shipped.into_iter().map(with_origin).collect();
        let host_name = Value::from(gethostname::gethostname().to_string_lossy());
        for (before, key, value) in
            [("kafka.group_id", "kafka.instance_id", host_name), (URL, HOUSEKEEPING_URL, Value::Null)]
        {
            let at = defaults.iter().position(|setting| setting.key == before).map_or(0, |at| at + 1);
            defaults.insert(at, with_origin((key.to_owned(), value)));
        }
        Self { settings: defaults.clone(), defaults, properties: BTreeMap::new(), problems: Vec::new() }
    }

    pub(super) fn add_file(&mut self, path: &Path, text: &str) {
        match text.parse() {
            Ok(table) => {
                for (key, value) in flattened(table) {
                    self.set(&key, value, Origin::File(path.to_path_buf()));
                }
            }
            Err(error) => self.problems.push(not_toml(path, text, &error)),
        }
    }

    /// Reads the variables that begin with [`PREFIX`]: `__` separates the parts of a name, and `_` in the
    /// name of a librdkafka property stands for a dot.
    pub(super) fn add_environment(&mut self, variables: impl IntoIterator<Item = (OsString, OsString)>) {
        let variables: BTreeMap<String, OsString> =
            variables.into_iter().filter_map(|(name, text)| Some((name.into_string().ok()?, text))).collect();
        let mut seen = BTreeMap::new();
        for (variable, text) in variables {
            let Some(name) = variable.strip_prefix(PREFIX) else { continue };
            let mut key = name.to_ascii_lowercase().replace("__", ".");
            if let Some(property) = key.strip_prefix("kafka.properties.") {
                key = format!("{PROPERTIES}.{}", property.replace('_', "."));
            }
            if let Some(first) = seen.insert(key.clone(), variable.clone()) {
                self.problems.push(format!(
                    "setting {key} is given by two environment variables, {first} and {variable}"
                ));
                continue;
            }
            let origin = Origin::Environment(variable);
            match text.into_string() {
                Ok(text) => {
                    let default = find(&self.defaults, &key).map(|setting| &setting.value);
                    self.set(&key, typed(text, default), origin);
                }
                Err(_) => self.problems.push(format!("{key} ({origin}) must be valid UTF-8")),
            }
        }
    }

    fn set(&mut self, key: &str, value: Value, origin: Origin) {
        if let Some(name) = key.strip_prefix("kafka.properties.") {
            let property = Effective { key: property_key(name), value, origin };
            self.properties.insert(name.to_owned(), property);
        } else if self.is_table(key) {
            let rule = match &origin {
                Origin::Environment(variable) => format!("must be given one by one, as {variable}__NAME"),
                _ if value.is_object() => return,
                _ => "must be a table".to_owned(),
            };
            self.problems.push(format!("{key} ({origin}) {rule}"));
        } else if let Some(setting) = self.settings.iter_mut().find(|setting| setting.key == key) {
            *setting = Effective { key: key.to_owned(), value, origin };
        } else {
            let nearest = self.nearest(key);
            let (name, place, nearest) = match &origin {
                Origin::Environment(variable) => {
                    (variable.as_str(), "in the environment".to_owned(), variable_of(nearest))
                }
                _ => (key, format!("({origin})"), nearest.to_owned()),
            };
            self.problems.push(format!("unknown setting {name} {place}; the nearest known one is {nearest}"));
        }
    }

    fn is_table(&self, key: &str) -> bool {
        let is_inside = |name: &str| name.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'));
        key == PROPERTIES || self.settings.iter().any(|setting| is_inside(&setting.key))
    }

    /// The known setting most similar to `key`. The right name in the wrong section counts nearly as much as
    /// a misspelled one.
    fn nearest(&self, key: &str) -> &str {
        let name = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
        let similarity = |known: &str| {
            strsim::jaro_winkler(known, key).max(strsim::jaro_winkler(&name(known), &name(key)) - 0.05)
        };
        let known = self.settings.iter().map(|setting| setting.key.as_str());
        known.max_by(|a, b| similarity(a).total_cmp(&similarity(b))).unwrap_or_default()
    }

    /// The typed settings, if the value of each is allowed.
    pub(super) fn settings(&mut self) -> Option<Settings> {
        let mut failed = BTreeSet::new();
        let mut settings: Settings = loop {
            let error = match serde_path_to_error::deserialize(self.tree()) {
                Ok(settings) => break settings,
                Err(error) => error,
            };
            let key = self.source_of(&error.path().to_string()).to_owned();
            if !failed.insert(key.clone()) {
                // The default is not allowed either: a host name that cannot be an instance id.
                return None;
            }
            self.refuse(&key, &error.inner().to_string());
            // The default takes its place, so that the settings after it are checked too.
            for (setting, default) in self.settings.iter_mut().zip(&self.defaults) {
                if setting.key == key {
                    setting.clone_from(default);
                }
            }
        };
        for (name, property) in &self.properties {
            let Effective { key, value, origin } = property;
            if let Err(rule) = settings.kafka.properties.add(name, value) {
                self.problems.push(format!("{key} ({origin}) {rule}"));
            }
        }
        for (keys, rule) in settings.conflicts() {
            if let Some(key) = keys.first().filter(|_| !keys.iter().any(|key| failed.contains(*key))) {
                self.refuse(key, &rule);
            }
        }
        Some(settings)
    }

    /// The settings as nested tables.
    fn tree(&self) -> Value {
        let mut sections: BTreeMap<&str, Map<String, Value>> = BTreeMap::new();
        for Effective { key, .. } in self.settings.iter().filter(|setting| setting.key != PROPERTIES) {
            let (section, name) = key.split_once('.').unwrap_or(("", key));
            let value = find(&self.settings, self.source_of(key)).map(|setting| setting.value.clone());
            sections.entry(section).or_default().insert(name.to_owned(), value.unwrap_or_default());
        }
        let mut root = sections.remove("").unwrap_or_default();
        root.extend(sections.into_iter().map(|(name, section)| (name.to_owned(), section.into())));
        Value::Object(root)
    }

    /// The setting whose value this one has.
    fn source_of<'a>(&self, key: &'a str) -> &'a str {
        let setting = find(&self.settings, key).filter(|setting| setting.origin == Origin::Default);
        if key == HOUSEKEEPING_URL && setting.is_some() { URL } else { key }
    }

    fn refuse(&mut self, key: &str, rule: &str) {
        let setting = find(&self.settings, key);
        let shown = match setting {
            // A URL may contain a password.
            Some(setting) if ![URL, HOUSEKEEPING_URL].contains(&key) => echo(&setting.value),
            _ => "(hidden)".to_owned(),
        };
        let origin = setting.map_or(&Origin::Default, |setting| &setting.origin);
        self.problems.push(format!("{key} = {shown} ({origin}) {rule}"));
    }

    /// Every value with its origin, without secrets.
    pub(super) fn effective(mut self, settings: &Settings) -> Vec<Effective> {
        for setting in &mut self.settings {
            let url = match setting.key.as_str() {
                URL => &settings.postgres.url,
                HOUSEKEEPING_URL => &settings.postgres.housekeeping_url,
                _ => continue,
            };
            setting.value = format!("postgres://{url}").into();
        }
        for (_, property) in self.properties.iter_mut().filter(|(name, _)| is_secret(name)) {
            property.value = HIDDEN.into();
        }
        let table = self.settings.iter().position(|setting| setting.key == PROPERTIES);
        if let Some(at) = table.filter(|_| !self.properties.is_empty()) {
            self.settings.splice(at..=at, self.properties.into_values());
        }
        self.settings
    }
}

fn find<'a>(settings: &'a [Effective], key: &str) -> Option<&'a Effective> {
    settings.iter().find(|setting| setting.key == key)
}

/// Dotted names and values. Whether the dotted name of a librdkafka property is quoted in TOML makes no
/// difference. An empty table is kept as a value, so that its name is checked.
fn flattened(table: toml::Table) -> Vec<(String, Value)> {
    let mut settings = Vec::new();
    for (name, value) in table {
        match value {
            toml::Value::Table(inner) if !inner.is_empty() => settings
                .extend(flattened(inner).into_iter().map(|(key, value)| (format!("{name}.{key}"), value))),
            value => settings.push((name, serde_json::to_value(value).unwrap_or_default())),
        }
    }
    settings
}

/// A text from the environment in the type of the setting's default, or unchanged if it does not have that
/// type.
fn typed(text: String, default: Option<&Value>) -> Value {
    let bare = text.trim();
    let value = match default {
        Some(Value::Bool(_)) => bare.parse::<bool>().map(Value::from).ok(),
        Some(Value::Number(number)) if number.is_i64() => bare.parse::<i64>().map(Value::from).ok(),
        Some(Value::Number(_)) => bare.parse().ok().and_then(serde_json::Number::from_f64).map(Value::from),
        Some(Value::Array(items)) => match items.first() {
            first @ Some(_) => {
                let items = bare.split(',').map(str::trim).filter(|item| !item.is_empty());
                Some(items.map(|item| typed(item.to_owned(), first)).collect())
            }
            // A command: its arguments may contain commas.
            None if bare.starts_with('[') => serde_json::from_str(bare).ok(),
            None => Some(Some(bare).filter(|program| !program.is_empty()).into_iter().collect()),
        },
        _ => None,
    };
    value.unwrap_or(Value::String(text))
}

/// The parser's full message quotes the line, and with it possibly a password; its short one does not.
fn not_toml(path: &Path, text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let place = before.map_or_else(String::new, |before| {
        let line = before.rsplit('\n').next().unwrap_or_default();
        format!(" at line {}, column {}", before.matches('\n').count() + 1, line.chars().count() + 1)
    });
    let reason = error.message().replace('\n', ", ");
    format!("settings file {} is not valid TOML{place}: {reason}", path.display())
}

/// The environment variable of a setting.
fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

/// A value in an error, at most 80 characters.
fn echo(value: &Value) -> String {
    const CHARS_MAX: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= CHARS_MAX {
        return text;
    }
    text.chars().take(CHARS_MAX).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_setting_is_the_one_that_was_meant() {
        for (written, meant) in [
            ("kafka.groupid", "kafka.group_id"),
            ("kafka.bootstrap.servers", "kafka.bootstrap_servers"),
            ("kafak.group_id", "kafka.group_id"),
            ("lane", "lanes"),
            ("batch.max_payment", "batch.max_payments"),
            ("max_payments", "batch.max_payments"),
            ("kafka.lanes", "lanes"),
            ("postgres.uri", "postgres.url"),
            ("log.fromat", "log.format"),
            ("idempotency.windows", "idempotency.window"),
            ("admin.port", "admin.listen"),
        ] {
            assert_eq!(Layers::defaults().nearest(written), meant, "{written}");
        }
    }
}
