//! Rewrites a message so that its bytes differ but its payload is the same.

use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value};

use super::payment::ulid_text;
use super::{GeneratorConfig, Payment, below, one_in, pick};

/// Names and values of a JSON object as text, in order.
pub(super) type Fields = Vec<(String, String)>;

/// Fields of a generated message. The amount is formatted from the payment: amounts are never floating-point
/// numbers.
pub(super) fn fields(payment: &Payment, json: &str) -> Fields {
    let object: Map<String, Value> = serde_json::from_str(json).unwrap_or_default();
    let mut fields: Fields = object.into_iter().map(|(name, value)| (name, value.to_string())).collect();
    set(&mut fields, "amount", payment.amount());
    fields
}

pub(super) fn set(fields: &mut Fields, name: &str, value: impl Into<String>) {
    match fields.iter_mut().find(|(field, _)| field == name) {
        Some((_, old)) => *old = value.into(),
        None => fields.push((name.to_owned(), value.into())),
    }
}

pub(super) fn join(fields: &Fields, between: &str) -> String {
    let members: Vec<String> =
        fields.iter().map(|(name, value)| format!("\"{name}\":{between}{value}")).collect();
    format!("{{{between}{}{between}}}", members.join(&format!(",{between}")))
}

/// Returns other bytes for the same payload.
pub(super) fn respell(payment: &Payment, config: &GeneratorConfig, rng: &mut ChaCha8Rng) -> String {
    let mut fields = fields(payment, &payment.json(config));
    let (_, scale) = payment.currency();
    let amount = payment.amount();
    let amount = match below(rng, 4) {
        0 => format!("\"{amount}\""),
        1 if scale > 0 => format!("{amount}000"),
        1 => format!("{amount}.00"),
        2 => format!("{}E-{scale}", payment.minor_units),
        _ => format!("\"{}0e-{}\"", payment.minor_units, scale + 1),
    };
    set(&mut fields, "amount", amount);
    set(&mut fields, "messageId", format!("\"{}\"", other_id(payment, rng)));
    if !fields.iter().any(|(name, _)| name == "comment") {
        set(&mut fields, "comment", pick(rng, &["null", "\"\""]));
    }
    if one_in(rng, 2) {
        set(&mut fields, "note", "[1,{\"amount\":1e999,\"x\":null}]");
    }
    for at in (1..fields.len()).rev() {
        fields.swap(at, below(rng, at as u32 + 1) as usize);
    }
    join(&fields, pick(rng, &["", " ", "\n\t"]))
}

/// The same 128 bits in another form or case. A ULID contains a time, so only time-ordered ids can become a
/// ULID.
fn other_id(payment: &Payment, rng: &mut ChaCha8Rng) -> String {
    let version_7 = payment.id >> 76 & 0xf == 7;
    let text = if (payment.ulid || version_7) && one_in(rng, 2) {
        ulid_text(payment.id)
    } else {
        uuid::Uuid::from_u128(payment.id).to_string()
    };
    if one_in(rng, 2) { text.to_ascii_lowercase() } else { text.to_ascii_uppercase() }
}
