//! Who may use the admin server: the token, the allowed names of this host, and what browsers are told.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use axum::extract::{ConnectInfo, FromRequestParts, Request, State};
use axum::http::header::{self, HeaderMap, HeaderValue};
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::http::{StatusCode, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use sha2::{Digest, Sha256};

use crate::config::read_token;
use crate::secrets::Blocking;
use crate::telemetry::logging::RateLimited;

const TOKEN_READ_MAX: Duration = Duration::from_secs(2);
/// Neither host nor token is checked: probes of orchestrators send neither.
const PROBES: [&str; 2] = ["/livez", "/readyz"];

/// `admin.token_file` and `admin.hosts`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// File with the token; `None`: everybody may ask.
    pub token_file: Option<PathBuf>,
    /// Names of this host, besides IP addresses and the names of the loopback.
    pub hosts: Vec<String>,
}

/// Middleware that answers callers that may not ask, and adds headers for browsers to each answer.
pub(super) async fn check(State(access): State<Access>, request: Request, next: Next) -> Response {
    let refused = access.refusal(request.uri(), request.headers()).await;
    let mut response = match refused {
        Some(refused) => refused,
        None => next.run(request).await,
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    ] {
        headers.entry(name).or_insert(HeaderValue::from_static(value));
    }
    response
}

impl Access {
    async fn refusal(&self, uri: &Uri, headers: &HeaderMap) -> Option<Response> {
        let path = uri.path();
        if PROBES.contains(&path) {
            return None;
        }
        // A page of another site can read this server through a name of its own (DNS rebinding). Scrapers may use any
        // name, so `/metrics` is exempt: without a token such a page can read it.
        if path != "/metrics" && !self.is_addressed(uri, headers) {
            let text = "this name of the host is not allowed; names are set by admin.hosts\n";
            return Some((StatusCode::FORBIDDEN, text).into_response());
        }
        let file = self.token_file.clone()?;
        static FILES: LazyLock<Blocking> = LazyLock::new(Blocking::new);
        match FILES.within(TOKEN_READ_MAX, move || read_token(&file)).await.flatten() {
            Ok(token) => {
                let given = headers.get(header::AUTHORIZATION).and_then(given_token);
                if given.is_some_and(|given| is_same(&given, &token)) {
                    return None;
                }
            }
            Err(reason) => {
                static LIMIT: RateLimited = RateLimited::new(1, Duration::from_secs(60));
                if let Some(suppressed) = LIMIT.pass() {
                    tracing::warn!(
                        reason,
                        suppressed,
                        "the admin server refuses requests: it has no token to compare"
                    );
                }
                let text = "admin.token_file cannot be read\n";
                return Some((StatusCode::SERVICE_UNAVAILABLE, text).into_response());
            }
        }
        let ask = [(header::WWW_AUTHENTICATE, "Basic realm=\"payment-writer\", charset=\"UTF-8\"")];
        let text = "the token of admin.token_file is needed, as bearer token or as password\n";
        Some((StatusCode::UNAUTHORIZED, ask, text).into_response())
    }

    /// Whether each host that the request names is allowed. Browsers always name one.
    fn is_addressed(&self, uri: &Uri, headers: &HeaderMap) -> bool {
        let named = headers.get_all(header::HOST).iter().map(|host| Authority::try_from(host.as_bytes()));
        named
            .chain(uri.authority().cloned().map(Ok))
            .all(|host| host.is_ok_and(|host| self.is_allowed(host.host())))
    }

    fn is_allowed(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        host.parse::<Ipv4Addr>().is_ok()
            || address.is_some_and(|address| address.parse::<Ipv6Addr>().is_ok())
            || host == "localhost"
            || host.ends_with(".localhost")
            || self.hosts.contains(&host)
    }
}

/// The token of a bearer, or the password of basic authentication (RFC 6750, RFC 7617).
fn given_token(value: &HeaderValue) -> Option<String> {
    let (scheme, rest) = value.to_str().ok()?.split_once(' ')?;
    match scheme.to_ascii_lowercase().as_str() {
        "bearer" => Some(rest.trim().to_owned()),
        "basic" => {
            let pair = String::from_utf8(openssl::base64::decode_block(rest.trim()).ok()?).ok()?;
            Some(pair.split_once(':')?.1.to_owned())
        }
        _ => None,
    }
}

/// Compares in constant time, also if the lengths differ.
fn is_same(given: &str, token: &str) -> bool {
    openssl::memcmp::eq(&Sha256::digest(given), &Sha256::digest(token))
}

/// The port may be open to a scraper in the network; only callers on this machine may change the process. Other
/// addresses of 127.0.0.0/8 may stand for the network: a service mesh's sidecar connects from 127.0.0.6.
fn is_from_here(caller: SocketAddr) -> bool {
    let ip = caller.ip().to_canonical();
    ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST
}

/// Extractor that accepts only local callers; runs before the extractor that reads the body.
pub(super) struct FromHere;

impl<S: Send + Sync> FromRequestParts<S> for FromHere {
    type Rejection = (StatusCode, &'static str);

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Self::Rejection> {
        match ConnectInfo::<SocketAddr>::from_request_parts(parts, state).await {
            Ok(ConnectInfo(caller)) if is_from_here(caller) => Ok(Self),
            _ => Err((
                StatusCode::FORBIDDEN,
                "the log level can be read and changed from 127.0.0.1 and ::1 only\n",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_machine_itself_may_ask_for_the_logs_level() {
        for (caller, expected) in [
            ("127.0.0.1:5", true),
            ("127.0.0.6:5", false),
            ("[::ffff:127.0.0.6]:5", false),
            ("[::1]:5", true),
            ("[::ffff:127.0.0.1]:5", true),
            ("10.0.0.1:5", false),
            ("[::ffff:10.0.0.1]:5", false),
            ("[fe80::1]:5", false),
        ] {
            assert_eq!(is_from_here(caller.parse().unwrap()), expected, "{caller}");
        }
    }

    #[test]
    fn addresses_and_names_of_the_loopback_are_allowed_and_other_names_if_they_are_set() {
        let access = Access { token_file: None, hosts: vec!["payments.example".to_owned()] };
        for (hosts, expected) in [
            (&["127.0.0.1:9464"][..], true),
            (&["10.1.2.3"], true),
            (&["[::1]:9464"], true),
            (&["localhost:9464"], true),
            (&["a.LocalHost."], true),
            (&["Payments.Example:443"], true),
            (&["payments.example.evil.test"], false),
            (&["evil.test:9464"], false),
            (&["127.0.0.1.evil.test"], false),
            (&["notlocalhost"], false),
            (&["127.0.0.1", "evil.test"], false),
            (&["a b"], false),
            (&[""], false),
            // Only what is no browser names none.
            (&[], true),
        ] {
            let mut headers = HeaderMap::new();
            for host in hosts {
                headers.append(header::HOST, HeaderValue::from_static(host));
            }
            assert_eq!(access.is_addressed(&Uri::from_static("/status"), &headers), expected, "{hosts:?}");
        }
        let target = Uri::from_static("http://evil.test/status");
        assert!(!access.is_addressed(&target, &HeaderMap::new()));
    }

    #[test]
    fn a_token_is_taken_from_a_bearer_and_from_a_password() {
        for (value, token) in [
            ("Bearer abc", Some("abc")),
            ("bearer abc", Some("abc")),
            ("Basic dXNlcjpwYTpzcw==", Some("pa:ss")),
            ("Basic dXNlcg==", None),
            ("Basic !", None),
            ("Digest abc", None),
            ("abc", None),
        ] {
            assert_eq!(given_token(&HeaderValue::from_static(value)).as_deref(), token, "{value}");
        }
        assert!(is_same("abc", "abc") && !is_same("abcd", "abc") && !is_same("", "abc"));
    }
}
