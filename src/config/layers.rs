//! The layers that settings come from: the defaults, the settings file, the environment.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;

use config::{Config, ConfigError, File, FileFormat, Map, Value, ValueKind};

use super::origin::{Effective, Origin, PREFIX};
use super::properties::{HIDDEN, PROPERTIES, is_secret, property_key};
use super::sections::Settings;

/// The shipped settings file sets every setting to its default, except two that have none of their own: these
/// are commented out.
const SHIPPED: &str = include_str!("../../config/payment-writer.toml");
/// By default the same as [`URL`].
const HOUSEKEEPING_URL: &str = "postgres.housekeeping_url";
const URL: &str = "postgres.url";

/// The merged layers, and everything that is wrong with them.
pub(super) struct Layers {
    /// In the order of the shipped file.
    defaults: Vec<(String, Value)>,
    merged: Config,
    pub(super) problems: Vec<String>,
}

impl Layers {
    pub(super) fn defaults() -> Self {
        let shipped = ["instance_id =", "housekeeping_url ="]
            .iter()
            .fold(SHIPPED.to_owned(), |text, name| text.replace(&format!("# {name}"), name));
        let merged = Config::builder()
            .add_source(File::from_str(&shipped, FileFormat::Toml))
            .set_override("kafka.instance_id", gethostname::gethostname().to_string_lossy().into_owned())
            .and_then(|layers| layers.build())
            .unwrap_or_default();
        Self { defaults: flattened(&merged.cache), merged, problems: Vec::new() }
    }

    pub(super) fn add_file(&mut self, path: &Path, text: &str) {
        let origin = path.to_string_lossy().into_owned();
        let with_origin = |(key, value): (String, Value)| (key, Value::new(Some(&origin), value.kind));
        match Config::builder().add_source(File::from_str(text, FileFormat::Toml)).build() {
            Ok(file) => self.add(flattened(&file.cache).into_iter().map(with_origin)),
            Err(error) => self.problems.push(not_toml(path, &error)),
        }
    }

    /// Reads the variables that begin with [`PREFIX`]: `__` separates the parts of a name, and `_` in the
    /// name of a librdkafka property stands for a dot.
    pub(super) fn add_environment(&mut self, variables: impl IntoIterator<Item = (OsString, OsString)>) {
        let variables: BTreeMap<String, OsString> =
            variables.into_iter().filter_map(|(name, text)| Some((name.into_string().ok()?, text))).collect();
        let mut values = BTreeMap::new();
        for (variable, text) in variables {
            let Some(name) = variable.strip_prefix(PREFIX) else { continue };
            let mut key = name.to_ascii_lowercase().replace("__", ".");
            if let Some(property) = key.strip_prefix("kafka.properties.") {
                key = format!("{PROPERTIES}.{}", property.replace('_', "."));
            }
            let Ok(text) = text.into_string() else {
                self.problems.push(format!("{key} (environment {variable}) must be valid UTF-8"));
                continue;
            };
            let value = Value::new(Some(&variable), typed(text, find(&self.defaults, &key)));
            if let Some(first) = values.insert(key.clone(), value) {
                self.problems.push(format!(
                    "setting {key} is given by two environment variables, {} and {variable}",
                    first.origin().unwrap_or_default()
                ));
            }
        }
        self.add(values);
    }

    /// Merges a layer, except for what is in the wrong place.
    fn add(&mut self, values: impl IntoIterator<Item = (String, Value)>) {
        let mut layer = Vec::new();
        let mut properties = Map::new();
        for (key, value) in values {
            if let Some(name) = key.strip_prefix("kafka.properties.") {
                properties.insert(name.to_owned(), value);
            } else if let Some(problem) = self.misplaced(&key, &value) {
                self.problems.push(problem);
            } else {
                layer.push((key, value));
            }
        }
        layer.push((PROPERTIES.to_owned(), properties.into()));
        self.merge(layer);
    }

    fn merge(&mut self, layer: impl IntoIterator<Item = (String, Value)>) {
        let layers = Config::builder().add_source(self.merged.clone());
        let layers =
            layer.into_iter().try_fold(layers, |layers, (key, value)| layers.set_override(key, value));
        // Names of settings are valid paths, and layers are in memory: this cannot fail.
        self.merged = layers.and_then(|layers| layers.build()).unwrap_or_default();
    }

    /// What is wrong with a setting of this name, if it is not one, or a table where there is none.
    fn misplaced(&self, key: &str, value: &Value) -> Option<String> {
        let origin = Origin::of(value);
        let is_table = matches!(value.kind, ValueKind::Table(_));
        let is_inside = |name: &str| name.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'));
        let is_section = key == PROPERTIES || self.defaults.iter().any(|(known, _)| is_inside(known));
        let nearest = self.nearest(key);
        match &origin {
            Origin::Environment(variable) if is_section => {
                Some(format!("{key} ({origin}) must be given one by one, as {variable}__NAME"))
            }
            _ if is_section => (!is_table).then(|| format!("{key} ({origin}) must be a table")),
            _ if nearest == key => is_table.then(|| format!("{key} = {{}} ({origin}) must not be a table")),
            Origin::Environment(variable) => Some(format!(
                "unknown setting {variable} in the environment; the nearest known one is {}",
                variable_of(nearest)
            )),
            _ => Some(format!("unknown setting {key} ({origin}); the nearest known one is {nearest}")),
        }
    }

    /// The known setting most similar to `key`. The right name in the wrong section counts nearly as much as
    /// a misspelled one.
    fn nearest(&self, key: &str) -> &str {
        let name = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
        let similarity = |known: &str| {
            strsim::jaro_winkler(known, key).max(strsim::jaro_winkler(&name(known), &name(key)) - 0.05)
        };
        let known = self.defaults.iter().map(|(key, _)| key.as_str());
        known.max_by(|a, b| similarity(a).total_cmp(&similarity(b))).unwrap_or_default()
    }

    /// The typed settings, if the value of each is allowed.
    pub(super) fn settings(&mut self) -> Option<Settings> {
        let mut failed = BTreeSet::new();
        let mut settings: Settings = loop {
            if self.value(HOUSEKEEPING_URL).origin().is_none() {
                self.merge([(HOUSEKEEPING_URL.to_owned(), Value::new(None, self.value(URL).kind))]);
            }
            let (key, rule) = match self.merged.clone().try_deserialize() {
                Ok(settings) => break settings,
                Err(ConfigError::At { key, error, .. }) => (key.unwrap_or_default(), error.to_string()),
                Err(error) => (String::new(), error.to_string()),
            };
            // The default is not allowed either if it failed before: a host name that cannot be an instance id.
            let default = find(&self.defaults, &key).filter(|_| failed.insert(key.clone()))?.clone();
            self.refuse(&key, &rule);
            // The default takes its place, so that the settings after it are checked too.
            self.merge([(key, default)]);
        };
        for (name, value) in self.merged.get_table(PROPERTIES).unwrap_or_default() {
            let origin = Origin::of(&value);
            if let Err(rule) = settings.kafka.properties.add(&name, &json(value)) {
                self.problems.push(format!("{} ({origin}) {rule}", property_key(&name)));
            }
        }
        let postgres = &mut settings.postgres;
        postgres.url = postgres.with_password(postgres.url.clone());
        postgres.housekeeping_url = postgres.with_password(postgres.housekeeping_url.clone());
        for (keys, rule) in settings.conflicts() {
            if let Some(key) = keys.first().filter(|_| !keys.iter().any(|key| failed.contains(*key))) {
                self.refuse(key, &rule);
            }
        }
        Some(settings)
    }

    fn value(&self, key: &str) -> Value {
        find(&flattened(&self.merged.cache), key).cloned().unwrap_or_default()
    }

    fn refuse(&mut self, key: &str, rule: &str) {
        let value = self.value(key);
        let origin = Origin::of(&value);
        // A URL may contain a password, and the place of a password's file the password itself.
        let shown = if [URL, HOUSEKEEPING_URL, "kafka.password_file"].contains(&key) {
            "(hidden)".to_owned()
        } else {
            echo(value)
        };
        self.problems.push(format!("{key} = {shown} ({origin}) {rule}"));
    }

    /// Every value with its origin, without secrets.
    pub(super) fn effective(&self, settings: &Settings) -> Vec<Effective> {
        let shown = |(key, value): (String, Value)| {
            let origin = Origin::of(&value);
            let url = |endpoint| serde_json::Value::from(format!("postgres://{endpoint}"));
            let (key, value) = match (key.as_str(), key.strip_prefix("kafka.properties.")) {
                (_, Some(name)) if is_secret(name) => (property_key(name), HIDDEN.into()),
                (_, Some(name)) => (property_key(name), json(value)),
                (URL, _) => (key, url(&settings.postgres.url)),
                (HOUSEKEEPING_URL, _) => (key, url(&settings.postgres.housekeeping_url)),
                _ => (key, json(value)),
            };
            Effective { key, value, origin }
        };
        flattened(&self.merged.cache).into_iter().map(shown).collect()
    }
}

fn find<'a>(values: &'a [(String, Value)], key: &str) -> Option<&'a Value> {
    values.iter().find(|(name, _)| name == key).map(|(_, value)| value)
}

/// Dotted names and values. Whether the dotted name of a librdkafka property is quoted in TOML makes no
/// difference. An empty table is kept as a value, so that its name is checked.
fn flattened(root: &Value) -> Vec<(String, Value)> {
    let ValueKind::Table(table) = &root.kind else { return Vec::new() };
    let inside = |(name, value): (&String, &Value)| match flattened(value) {
        inner if inner.is_empty() => vec![(name.clone(), value.clone())],
        inner => inner.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)).collect(),
    };
    table.iter().flat_map(inside).collect()
}

/// A text from the environment in the type of the setting's default, or unchanged if it does not have that
/// type.
fn typed(text: String, default: Option<&Value>) -> ValueKind {
    let bare = text.trim();
    let value = match default.map(|default| &default.kind) {
        Some(ValueKind::Boolean(_)) => bare.parse().map(ValueKind::Boolean).ok(),
        Some(ValueKind::I64(_)) => bare.parse().map(ValueKind::I64).ok(),
        Some(ValueKind::Float(_)) => {
            bare.parse().ok().filter(|number: &f64| number.is_finite()).map(Into::into)
        }
        Some(ValueKind::Array(items)) => match items.first() {
            first @ Some(_) => {
                let items = bare.split(',').map(str::trim).filter(|item| !item.is_empty());
                Some(items.map(|item| typed(item.to_owned(), first)).collect::<Vec<_>>().into())
            }
            // A command: its arguments may contain commas.
            None if bare.starts_with('[') => serde_json::from_str::<Vec<Value>>(bare).map(Into::into).ok(),
            None => Some(Vec::from_iter(Some(bare).filter(|program| !program.is_empty())).into()),
        },
        _ => None,
    };
    value.unwrap_or(ValueKind::String(text))
}

/// The parser's message without the line that it quotes, which may contain a password.
fn not_toml(path: &Path, error: &ConfigError) -> String {
    let text = error.to_string();
    let lines = text.lines().enumerate().filter(|(at, _)| !(1..=3).contains(at)).map(|(_, line)| line);
    let reason = lines.collect::<Vec<_>>().join(": ").replace("TOML parse error", "it is not valid TOML");
    format!("cannot read settings file {}: {reason}", path.display())
}

/// The environment variable of a setting.
fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "__").to_ascii_uppercase())
}

fn json(value: Value) -> serde_json::Value {
    value.try_deserialize().unwrap_or_default()
}

/// A value in an error, at most 80 characters.
fn echo(value: Value) -> String {
    const CHARS_MAX: usize = 80;
    let text = json(value).to_string();
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
            ("admin.listn", "admin.listen"),
        ] {
            assert_eq!(Layers::defaults().nearest(written), meant, "{written}");
        }
    }
}
