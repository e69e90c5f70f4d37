//! Reasons why a record is not a valid payment.

use std::borrow::Cow;
use std::fmt;

/// Why a record is dead-lettered, in the order in which the rules are checked.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
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
    pub const ALL: [Reason; 11] = [
        Reason::EmptyValue,
        Reason::TooLarge,
        Reason::UnsupportedSchemaVersion,
        Reason::MalformedJson,
        Reason::MissingField,
        Reason::InvalidField,
        Reason::KeyMismatch,
        Reason::InvalidTimestamp,
        Reason::StaleMessageId,
        Reason::MessageIdConflict,
        Reason::RejectedByDatabase,
    ];

    /// The name used in headers and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::EmptyValue => "empty_value",
            Reason::TooLarge => "too_large",
            Reason::UnsupportedSchemaVersion => "unsupported_schema_version",
            Reason::MalformedJson => "malformed_json",
            Reason::MissingField => "missing_field",
            Reason::InvalidField => "invalid_field",
            Reason::KeyMismatch => "key_mismatch",
            Reason::InvalidTimestamp => "invalid_timestamp",
            Reason::StaleMessageId => "stale_message_id",
            Reason::MessageIdConflict => "message_id_conflict",
            Reason::RejectedByDatabase => "rejected_by_database",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a record is refused: the headers `dlq-reason` and `dlq-detail` of its dead letter.
#[derive(Clone, PartialEq, Eq, Debug)]
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

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.detail)
    }
}

impl std::error::Error for Refusal {}

/// The fields of the payment message, in the contract's order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
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
    pub(super) const COUNT: usize = 8;

    #[cfg(test)]
    pub(super) const ALL: [Field; Self::COUNT] = [
        Field::MessageId,
        Field::CustId,
        Field::Amount,
        Field::Currency,
        Field::Status,
        Field::Type,
        Field::Comment,
        Field::ExternalRefId,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Field::MessageId => "messageId",
            Field::CustId => "custId",
            Field::Amount => "amount",
            Field::Currency => "currency",
            Field::Status => "status",
            Field::Type => "type",
            Field::Comment => "comment",
            Field::ExternalRefId => "externalRefId",
        }
    }

    /// The index of the field with this name; `None` for a field to ignore.
    pub(super) fn index_of(name: &str) -> Option<usize> {
        let field = match name {
            "messageId" => Field::MessageId,
            "custId" => Field::CustId,
            "amount" => Field::Amount,
            "currency" => Field::Currency,
            "status" => Field::Status,
            "type" => Field::Type,
            "comment" => Field::Comment,
            "externalRefId" => Field::ExternalRefId,
            _ => return None,
        };
        Some(field as usize)
    }
}

pub(super) fn missing(field: Field) -> Refusal {
    Refusal::new(Reason::MissingField, format!("{}: absent or null", field.name()))
}

pub(super) fn invalid(field: Field, rule: &'static str) -> Refusal {
    Refusal::new(Reason::InvalidField, format!("{}: {rule}", field.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_named_once_and_listed_in_order() {
        let mut names: Vec<_> = Reason::ALL.iter().map(|r| r.as_str()).collect();
        assert!(Reason::ALL.is_sorted());
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Reason::ALL.len());
    }

    #[test]
    fn fields_are_found_by_their_name_alone() {
        for (index, field) in Field::ALL.into_iter().enumerate() {
            assert_eq!(Field::index_of(field.name()), Some(index));
        }
        for name in ["", "messageid", "custId ", "Amount", "comments"] {
            assert_eq!(Field::index_of(name), None);
        }
    }
}
