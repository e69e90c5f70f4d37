//! The parameters of a Postgres URL: which the driver takes, which are ours, and which are refused.

use std::collections::BTreeMap;

use percent_encoding::percent_decode_str;

use super::{EndpointError, invalid};

/// Parameters that the URL can override. An unreachable host is given up after 5 s. Unacknowledged data is a
/// failure after 20 s, so that a server that vanished is noticed sooner than by TCP's default of 15 minutes.
const DEFAULTS: &str = "application_name=payment-writer&connect_timeout=5&tcp_user_timeout=20\
    &keepalives_idle=15&keepalives_interval=5&keepalives_retries=3";

/// Parameters of libpq that have no effect here: there is no GSSAPI, and the driver always uses SNI and protocol 3.0.
pub(super) const WITHOUT_EFFECT: [&str; 8] = [
    "gssencmode",
    "gssdelegation",
    "gsslib",
    "krbsrvname",
    "sslsni",
    "sslcompression",
    "min_protocol_version",
    "max_protocol_version",
];

/// Parameters of libpq that are refused, because without their effect another server or a weaker connection could be
/// used.
pub(super) const NOT_SUPPORTED: [&str; 12] = [
    "service",
    "servicefile",
    "sslcrl",
    "sslcrldir",
    "sslpassword",
    "sslcertmode",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "requirepeer",
    "require_auth",
    "requiressl",
    "replication",
];

/// URL parameters that tokio-postgres does not know, by name.
pub(super) type OwnParameters = BTreeMap<&'static str, String>;

pub(super) struct Parameters {
    /// The URL as tokio-postgres takes it.
    pub plain_url: String,
    pub own: OwnParameters,
    pub ignored: Vec<String>,
}

/// Sorts the parameters of the URL, because tokio-postgres rejects those that it does not know, and adds [`DEFAULTS`].
pub(super) fn take_parameters(url: &str) -> Result<Parameters, EndpointError> {
    let authority = url
        .strip_prefix("postgres://")
        .or_else(|| url.strip_prefix("postgresql://"))
        .ok_or_else(|| invalid("it does not begin with postgres:// or postgresql://"))?;
    // A question mark before the first @ belongs to the password.
    let credentials = authority.find('@').map_or(0, |at| at + 1);
    let mark = authority.get(credentials..).and_then(|rest| rest.find('?')).map(|at| credentials + at);
    let (place, query) = mark.and_then(|at| authority.split_at_checked(at)).unwrap_or((authority, ""));
    let (mut fallback_name, mut rest) = (String::new(), String::new());
    let mut own = OwnParameters::new();
    let mut is_encrypted = false;
    let mut ignored = Vec::new();
    for parameter in query.trim_start_matches('?').split('&').filter(|p| !p.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        let own_name = ["sslmode", "sslrootcert", "sslcert", "sslkey", "passfile"]
            .into_iter()
            .find(|known| *known == name);
        if let Some(name) = own_name {
            let value = percent_decode_str(value)
                .decode_utf8()
                .map_err(|_| invalid(&format!("the value of {name} is not well encoded")))?;
            own.insert(name, value.into_owned());
            continue;
        }
        match (name, value) {
            // As in libpq, which knows no other value.
            ("ssl", "true") => is_encrypted = true,
            ("ssl", _) => return Err(invalid("ssl takes no value but true; use sslmode")),
            ("keepalives_count", count) => rest.extend(["&keepalives_retries=", count]),
            ("fallback_application_name", name) => fallback_name = format!("&application_name={name}"),
            ("target_session_attrs", "primary") => rest.push_str("&target_session_attrs=read-write"),
            ("target_session_attrs", "standby") => rest.push_str("&target_session_attrs=read-only"),
            ("target_session_attrs", "prefer-standby") => {
                return Err(invalid("target_session_attrs=prefer-standby is not supported"));
            }
            // The driver uses no other encoding.
            ("client_encoding", encoding)
                if ["utf8", "utf-8", "auto"].contains(&encoding.to_ascii_lowercase().as_str()) => {}
            ("client_encoding", _) => return Err(invalid("client_encoding is not UTF8")),
            ("gssencmode", "disable") => {}
            ("gssencmode", "require") => return Err(invalid("gssencmode=require is not supported")),
            _ if WITHOUT_EFFECT.contains(&name) => ignored.push(name.to_owned()),
            _ if NOT_SUPPORTED.contains(&name) => return Err(invalid(&format!("{name} is not supported"))),
            _ => rest.extend(["&", parameter]),
        }
    }
    if is_encrypted {
        let mode = own.entry("sslmode").or_insert_with(|| "require".to_owned());
        if !["require", "verify-ca", "verify-full"].contains(&mode.as_str()) {
            return Err(invalid("ssl=true contradicts sslmode"));
        }
    }
    let plain_url = format!("postgres://{place}?{DEFAULTS}{fallback_name}{rest}");
    Ok(Parameters { plain_url, own, ignored })
}
