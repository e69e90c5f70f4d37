//! Reasons why a record is not a valid payment.

use std::borrow::Cow;

use strum::VariantArray;

/// Why a record is dead-lettered, in the order in which the rules are checked.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Debug,
    strum::Display,
    strum::EnumString,
    strum::IntoStaticStr,
    strum::VariantArray,
)]
#[strum(serialize_all = "snake_case")]
pub enum Reason {
    /// The value is null or has zero bytes.
    EmptyValue,
    /// The value is larger than `payment.max_bytes`.
    TooLarge,
    /// A header `schema-version` is not exactly `1`.
    UnsupportedSchemaVersion,
    /// The value is not a JSON object by the contract's rules.
    MalformedJson,
    /// A required field is absent or null.
    MissingField,
    /// A field breaks its rule.
    InvalidField,
    /// The key is not the decimal text of `custId`.
    KeyMismatch,
    /// The record has no timestamp, or one outside the years 2000 to 2099.
    InvalidTimestamp,
    /// The time in the message id is too far from the record's timestamp.
    StaleMessageId,
    /// Another record has the same message id and another payload. Needs the database.
    MessageIdConflict,
    /// The database refused this row.
    RejectedByDatabase,
}

impl Reason {
    /// All reasons, in order.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// The name used in headers and metrics.
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Why a record is refused: the headers `dlq-reason` and `dlq-detail` of its dead letter.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Refusal {
    /// The broken rule of the contract.
    pub reason: Reason,
    /// The field and the rule as text; never a value of the message.
    pub detail: Cow<'static, str>,
}

impl Refusal {
    /// Creates a refusal. `detail` names the field and the rule and contains no value.
    pub fn new(reason: Reason, detail: impl Into<Cow<'static, str>>) -> Self {
        Refusal { reason, detail: detail.into() }
    }
}

/// The fields of the payment message, in the contract's order.
#[derive(Clone, Copy, Debug, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "camelCase")]
pub(super) enum Field {
    MessageId,
    CustId,
    Amount,
    Currency,
    Status,
    Type,
    Comment,
    ExternalRefId,
}

impl Field {
    pub(super) fn name(self) -> &'static str {
        self.into()
    }

    /// The index of the field with this name; `None` for a field to ignore.
    pub(super) fn index_of(name: &str) -> Option<usize> {
        name.parse().ok().map(|field: Self| field as usize)
    }
}

pub(super) fn missing(field: Field) -> Refusal {
    of_field(Reason::MissingField, field, "absent or null")
}

pub(super) fn invalid(field: Field, rule: &str) -> Refusal {
    of_field(Reason::InvalidField, field, rule)
}

fn of_field(reason: Reason, field: Field, rule: &str) -> Refusal {
    Refusal::new(reason, format!("{}: {rule}", field.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_name_alone() {
        for (index, field) in Field::VARIANTS.iter().enumerate() {
            assert_eq!(Field::index_of(field.name()), Some(index));
        }
        for name in ["", "messageid", "custId ", "Amount", "comments"] {
            assert_eq!(Field::index_of(name), None);
        }
    }
}
