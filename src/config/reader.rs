//! From the merged layers to typed values, noting every problem on the way.

use std::time::Duration;

use config::{Map, Value, ValueKind};

use super::duration;
use super::layers::property_key;
use super::origin::Origin;
use super::problem::Problem;
use super::properties::{self, KafkaProperties, Refusal};
use super::schema::{self, Fallback};
use super::secret::HIDDEN;
use super::size::ByteSize;

/// A setting as it takes effect, for people to look at: secrets are hidden already.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Effective {
    /// Dotted name.
    pub key: String,
    /// The value in the type in which it is set.
    pub value: serde_json::Value,
    /// Where it came from.
    #[serde(serialize_with = "as_text")]
    pub origin: Origin,
}

fn as_text<S: serde::Serializer>(origin: &Origin, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(origin)
}

/// A value before it has a type. The environment has only texts; a file has types, and a text in
/// the place of a number is as wrong there as the reverse.
pub(super) struct Raw<'a> {
    kind: &'a ValueKind,
    from_environment: bool,
}

/// What is allowed: "must be …".
pub(super) type Rule = String;

impl<'a> Raw<'a> {
    pub(super) fn text(&self) -> Result<&'a str, Rule> {
        match self.kind {
            ValueKind::String(text) => Ok(text),
            _ => Err("must be a text in quotes".to_owned()),
        }
    }

    pub(super) fn boolean(&self) -> Result<bool, Rule> {
        match self.kind {
            ValueKind::Boolean(value) => Ok(*value),
            ValueKind::String(text) if self.from_environment => {
                text.trim().parse().map_err(|_| "must be true or false".to_owned())
            }
            _ => Err("must be true or false".to_owned()),
        }
    }

    pub(super) fn integer(&self, low: i64, high: i64) -> Result<i64, Rule> {
        let value = match self.kind {
            ValueKind::I64(value) => Some(*value),
            ValueKind::String(text) if self.from_environment => text.trim().parse().ok(),
            _ => None,
        };
        value
            .filter(|value| (low..=high).contains(value))
            .ok_or_else(|| format!("must be a whole number from {low} to {high}"))
    }

    pub(super) fn number(&self, low: f64, high: f64) -> Result<f64, Rule> {
        let value = match self.kind {
            ValueKind::Float(value) => Some(*value),
            ValueKind::I64(value) => i32::try_from(*value).ok().map(f64::from),
            ValueKind::String(text) if self.from_environment => text.trim().parse().ok(),
            _ => None,
        };
        value
            .filter(|value| (low..=high).contains(value))
            .ok_or_else(|| format!("must be a number from {low} to {high}"))
    }

    pub(super) fn duration(&self, low: Duration, high: Duration) -> Result<Duration, Rule> {
        let value = match self.kind {
            ValueKind::String(text) => duration::parse(text),
            _ => None,
        };
        value.filter(|value| (low..=high).contains(value)).ok_or_else(|| {
            let (low, high) = (duration::format(low), duration::format(high));
            format!("must be a duration with its unit, like 5ms, 30s, 2h or 7d, from {low} to {high}")
        })
    }

    pub(super) fn size(&self, low: ByteSize, high: ByteSize) -> Result<ByteSize, Rule> {
        let value = match self.kind {
            ValueKind::String(text) => ByteSize::parse(text),
            ValueKind::I64(bytes) => u64::try_from(*bytes).ok().map(ByteSize::from_bytes),
            _ => None,
        };
        value
            .filter(|value| (low..=high).contains(value))
            .ok_or_else(|| format!("must be a size, like 512, 16KiB or 8MiB, from {low} to {high}"))
    }

    /// The items of an array; in the environment they stand between commas.
    pub(super) fn texts(&self) -> Result<Vec<String>, Rule> {
        let rule = || "must be an array of texts (in the environment: between commas)".to_owned();
        match self.kind {
            ValueKind::Array(items) => items
                .iter()
                .map(|item| match &item.kind {
                    ValueKind::String(text) => Ok(text.clone()),
                    _ => Err(rule()),
                })
                .collect(),
            ValueKind::String(text) if self.from_environment => Ok(between_commas(text).collect()),
            _ => Err(rule()),
        }
    }

    /// As [`Raw::texts`], of a command, whose arguments may have commas: in the environment it is an array in JSON, or one
    /// program without arguments.
    pub(super) fn words(&self) -> Result<Vec<String>, Rule> {
        match self.kind {
            ValueKind::String(text) if self.from_environment && text.trim_start().starts_with('[') => {
                serde_json::from_str(text).map_err(|_| "must be an array of texts in JSON".to_owned())
            }
            ValueKind::String(text) if self.from_environment && !text.trim().is_empty() => {
                Ok(vec![text.trim().to_owned()])
            }
            _ => self.texts(),
        }
    }

    /// As [`Raw::texts`], of whole numbers.
    pub(super) fn integers(&self) -> Result<Vec<i64>, Rule> {
        let rule = || "must be an array of whole numbers (in the environment: between commas)".to_owned();
        match self.kind {
            ValueKind::Array(items) => items
                .iter()
                .map(|item| match item.kind {
                    ValueKind::I64(number) => Ok(number),
                    _ => Err(rule()),
                })
                .collect(),
            ValueKind::String(text) if self.from_environment => {
                between_commas(text).map(|item| item.parse().map_err(|_| rule())).collect()
            }
            _ => Err(rule()),
        }
    }
}

fn between_commas(text: &str) -> impl Iterator<Item = String> {
    text.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty())
}

/// Takes settings out of the merged layers one by one.
pub(super) struct Reader {
    root: Map<String, Value>,
    pub(super) problems: Vec<Problem>,
    pub(super) effective: Vec<Effective>,
}

impl Reader {
    pub(super) fn new(root: Value, problems: Vec<Problem>) -> Self {
        let root = match root.kind {
            ValueKind::Table(table) => table,
            _ => Map::new(),
        };
        Self { root, problems, effective: Vec::new() }
    }

    fn value(&self, key: &str) -> Option<&Value> {
        match key.split_once('.') {
            None => self.root.get(key),
            Some((section, name)) => match &self.root.get(section)?.kind {
                ValueKind::Table(table) => table.get(name),
                _ => None,
            },
        }
    }

    /// The value of a setting, and where it came from. A setting that is by default the same as
    /// another takes that one's value and is itself set by nobody.
    fn lookup(&self, key: &str) -> (Value, Origin) {
        if let Some(value) = self.value(key) {
            return (value.clone(), Origin::from_tag(value.origin()));
        }
        match schema::find(key).map(|spec| spec.fallback) {
            Some(Fallback::SameAs(other)) => (self.lookup(other).0, Origin::Default),
            _ => (Value::new(None, ValueKind::Nil), Origin::Default),
        }
    }

    /// Reads one setting; `None` means that a problem was noted.
    pub(super) fn read<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&Raw<'_>) -> Result<T, Rule>,
    ) -> Option<T> {
        self.read_shown(key, parse, |_| None)
    }

    /// As [`Reader::read`], for a secret of which `shown` tells what may be seen.
    pub(super) fn read_shown<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&Raw<'_>) -> Result<T, Rule>,
        shown: impl FnOnce(&T) -> Option<String>,
    ) -> Option<T> {
        let (value, origin) = self.lookup(key);
        let secret = schema::find(key).is_none_or(|spec| spec.secret);
        // What a text of the environment stands for is known by its tag alone: a default that is
        // taken over from another setting keeps that one's.
        let from_environment = matches!(Origin::from_tag(value.origin()), Origin::Environment(_));
        match parse(&Raw { kind: &value.kind, from_environment }) {
            Ok(parsed) => {
                let value = match shown(&parsed) {
                    Some(text) => serde_json::Value::from(text),
                    None if secret => serde_json::Value::from(HIDDEN),
                    None => json(&value.kind),
                };
                self.effective.push(Effective { key: key.to_owned(), value, origin });
                Some(parsed)
            }
            Err(rule) => {
                // A default that is wrong because the setting it follows is wrong was reported there.
                let follows = matches!(
                    schema::find(key).map(|spec| spec.fallback),
                    Some(Fallback::SameAs(_)) if self.value(key).is_none()
                );
                if !follows {
                    let value = Some(if secret { HIDDEN.to_owned() } else { echo(&value.kind) });
                    self.problems.push(Problem::Invalid { key: key.to_owned(), value, origin, rule });
                }
                None
            }
        }
    }

    /// Reads `kafka.properties`, each property with an origin of its own.
    pub(super) fn properties(&mut self) -> KafkaProperties {
        let mut taken = KafkaProperties::default();
        let table = match self.value(schema::PROPERTIES).map(|value| value.kind.clone()) {
            Some(ValueKind::Table(table)) => table,
            _ => Map::new(),
        };
        if table.is_empty() {
            self.effective.push(Effective {
                key: schema::PROPERTIES.to_owned(),
                value: serde_json::Value::Object(serde_json::Map::new()),
                origin: Origin::Default,
            });
        }
        let mut names: Vec<_> = table.iter().collect();
        names.sort_by_key(|(name, _)| *name);
        for (name, value) in names {
            let origin = Origin::from_tag(value.origin());
            let text = match &value.kind {
                ValueKind::String(text) => Ok(text.clone()),
                ValueKind::Boolean(flag) => Ok(flag.to_string()),
                ValueKind::I64(number) => Ok(number.to_string()),
                _ => Err(Refusal::Rule("must be a text, a whole number, true or false".to_owned())),
            };
            let secret = properties::is_secret(name);
            let shown = if secret { HIDDEN.to_owned() } else { echo(&value.kind) };
            match text.and_then(|text| taken.add(name, &text)) {
                Ok(()) => {
                    let value = if secret { serde_json::Value::from(HIDDEN) } else { json(&value.kind) };
                    self.effective.push(Effective { key: property_key(name), value, origin });
                }
                Err(Refusal::Unknown) => self.problems.push(Problem::Unknown {
                    name: property_key(name),
                    origin,
                    nearest: property_key(KafkaProperties::nearest(name)),
                }),
                Err(Refusal::Rule(rule)) => {
                    let (key, value) = (property_key(name), Some(shown));
                    self.problems.push(Problem::Invalid { key, value, origin, rule });
                }
            }
        }
        taken
    }

    /// Notes a problem that only shows when settings are seen together.
    pub(super) fn refuse(&mut self, key: &str, rule: impl Into<String>) {
        let (value, origin) = self.lookup(key);
        let secret = schema::find(key).is_none_or(|spec| spec.secret);
        let value = Some(if secret { HIDDEN.to_owned() } else { echo(&value.kind) });
        self.problems.push(Problem::Invalid { key: key.to_owned(), value, origin, rule: rule.into() });
    }
}

/// A value in an error: quoted as in TOML, and not longer than a line.
fn echo(kind: &ValueKind) -> String {
    const CHARS_MAX: usize = 80;
    let text = json(kind).to_string();
    if text.chars().count() <= CHARS_MAX {
        return text;
    }
    text.chars().take(CHARS_MAX).chain(['…']).collect()
}

fn json(kind: &ValueKind) -> serde_json::Value {
    match kind {
        ValueKind::Nil => serde_json::Value::Null,
        ValueKind::Boolean(value) => (*value).into(),
        ValueKind::I64(value) => (*value).into(),
        ValueKind::U64(value) => (*value).into(),
        ValueKind::I128(value) => value.to_string().into(),
        ValueKind::U128(value) => value.to_string().into(),
        ValueKind::Float(value) => (*value).into(),
        ValueKind::String(text) => text.as_str().into(),
        ValueKind::Array(items) => items.iter().map(|item| json(&item.kind)).collect(),
        ValueKind::Table(_) => serde_json::Value::Object(serde_json::Map::new()),
    }
}
