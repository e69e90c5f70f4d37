//! Tokens for SASL OAUTHBEARER that a command creates (`kafka.token_command`), as for AWS MSK with IAM.
//!
//! A client requests its token on a thread that serves the group or a lane, which must not wait for a
//! command. So one thread of the process runs the command, always before the last token expires, and keeps
//! the token for all clients.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::ClientConfig;
use rdkafka::client::{Client, ClientContext, OAuthToken};
use serde::Deserialize;

use super::librdkafka::set_token;
use crate::config::{KafkaSettings, TOKEN_PROPERTY};
use crate::secrets::output_of;

/// A command that takes longer is killed.
const COMMAND_MAX: Duration = Duration::from_secs(20);
/// Pause after a command that failed.
const RETRY: Duration = Duration::from_secs(5);
/// A token is renewed after this share of its lifetime. librdkafka requests the next one at 0.8.
const RENEWED_AT: f64 = 0.7;
/// A token is renewed after this time at the latest, in case a clock is wrong.
const RENEWED_WITHIN: Duration = Duration::from_secs(3_600);

/// A token, with its principal and expiry as they are passed to librdkafka.
#[derive(Clone, PartialEq, Eq)]
struct Token {
    text: String,
    principal: String,
    /// Milliseconds since 1970.
    expires_at_ms: i64,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("expires_at_ms", &self.expires_at_ms).finish_non_exhaustive()
    }
}

/// What a command may print instead of a bare JSON Web Token.
#[derive(Deserialize)]
struct Printed {
    token: String,
    expires_at_ms: i64,
    principal: Option<String>,
}

/// The claims of a JSON Web Token that are used here (RFC 7519, 4.1).
#[derive(Deserialize)]
struct Claims {
    exp: f64,
    sub: Option<String>,
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

impl Token {
    /// Parses the command's output. Errors never contain any of it.
    fn read(output: &str) -> Result<Self, String> {
        let token = Self::parse(output.trim())?;
        // librdkafka's error about a token with other characters contains the token.
        if token.text.is_empty() || !token.text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("its token has characters other than visible ASCII".to_owned());
        }
        if token.principal.is_empty() || token.principal.chars().any(char::is_control) {
            return Err("its token names a principal that is empty or has control characters".to_owned());
        }
        Ok(token)
    }

    fn parse(output: &str) -> Result<Self, String> {
        if output.starts_with('{') {
            let Printed { token, expires_at_ms, principal } = serde_json::from_str(output).map_err(|_| {
                "it wrote JSON, but not an object with `token` (a string) and `expires_at_ms` (ms since 1970)"
            })?;
            return Ok(Self::new(token, principal, expires_at_ms));
        }
        let claims = claims(output).ok_or(
            "it wrote neither a JSON Web Token with an expiry (`exp`), nor a JSON object with `token` and \
             `expires_at_ms`",
        )?;
        Ok(Self::new(output.to_owned(), claims.sub, (claims.exp * 1_000.0) as i64))
    }

    fn new(text: String, principal: Option<String>, expires_at_ms: i64) -> Self {
        Self { text, principal: principal.unwrap_or_else(|| "payment-writer".to_owned()), expires_at_ms }
    }

    fn is_valid(&self) -> bool {
        self.expires_at_ms > now_ms()
    }

    /// How long the token is used before it is renewed.
    fn renewed_after(&self) -> Duration {
        let left = u64::try_from(self.expires_at_ms - now_ms()).unwrap_or_default();
        Duration::from_millis(left).mul_f64(RENEWED_AT).min(RENEWED_WITHIN).max(Duration::from_secs(1))
    }
}

/// The claims, which are the second of a token's three parts. The signature is not verified here; the broker
/// does that.
fn claims(token: &str) -> Option<Claims> {
    let mut parts = token.split('.');
    let (_, payload, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else {
        return None;
    };
    let mut text = payload.replace('-', "+").replace('_', "/");
    text.extend(std::iter::repeat_n('=', (4 - text.len() % 4) % 4));
    serde_json::from_slice(&openssl::base64::decode_block(&text).ok()?).ok()
}

/// Runs the command to its end, within [`COMMAND_MAX`].
fn run(command: &[String]) -> Result<Token, String> {
    let token = Token::read(&output_of(command, &[], COMMAND_MAX)?)?;
    if token.is_valid() { Ok(token) } else { Err("its token has expired already".to_owned()) }
}

/// The latest token, or why there is none.
#[derive(Default)]
struct Keeper {
    last: Mutex<Option<Result<Token, String>>>,
    changed: Condvar,
    /// New clients have another keeper.
    is_forgotten: AtomicBool,
}

impl Keeper {
    fn lock(&self) -> MutexGuard<'_, Option<Result<Token, String>>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Renews the token until it is forgotten.
    fn keep(&self, command: &[String]) {
        let mut is_failing = false;
        while !self.is_forgotten.load(Ordering::Acquire) {
            let made = run(command);
            match &made {
                Ok(_) if is_failing => tracing::info!("the token command works again"),
                Err(reason) if !is_failing => {
                    tracing::warn!(%reason, "the token command created no token; retrying every few seconds");
                }
                _ => {}
            }
            is_failing = made.is_err();
            let pause = made.as_ref().map_or(RETRY, Token::renewed_after);
            let mut last = self.lock();
            // After a failure, the old token stays in use while it is valid.
            if made.is_ok() || !matches!(&*last, Some(Ok(token)) if token.is_valid()) {
                *last = Some(made);
            }
            drop(last);
            self.changed.notify_all();
            self.rest(pause);
        }
    }

    /// Sleeps, at most until the token expires by the wall clock: the clock may have been set, or the machine
    /// suspended.
    fn rest(&self, pause: Duration) {
        let until = Instant::now() + pause;
        while Instant::now() < until && !self.is_forgotten.load(Ordering::Acquire) {
            std::thread::sleep(RETRY.min(until.saturating_duration_since(Instant::now())));
            if matches!(&*self.lock(), Some(Ok(token)) if !token.is_valid()) {
                return;
            }
        }
    }

    /// Returns a valid token; waits for the first one.
    fn token(&self) -> Result<Token, String> {
        let waited = self.changed.wait_timeout_while(self.lock(), COMMAND_MAX, |last| last.is_none());
        let (last, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(Ok(token)) if token.is_valid() => Ok(token.clone()),
            Some(Ok(_)) => Err("the token has expired, and the token command created no other".to_owned()),
            Some(Err(reason)) => Err(format!("the token command created no token: {reason}")),
            None => Err("the token command has not ended yet".to_owned()),
        }
    }
}

type Keepers = HashMap<Vec<String>, Arc<Keeper>>;

fn keepers() -> MutexGuard<'static, Keepers> {
    static KEEPERS: LazyLock<Mutex<Keepers>> = LazyLock::new(Mutex::default);
    KEEPERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Forgets all tokens: the next client waits for a new one.
pub fn forget() {
    keepers().drain().for_each(|(_, keeper)| keeper.is_forgotten.store(true, Ordering::Release));
}

/// The keeper of a command, shared by all clients.
fn keeper(command: &[String]) -> Result<Arc<Keeper>, String> {
    let mut keepers = keepers();
    if let Some(keeper) = keepers.get(command) {
        return Ok(Arc::clone(keeper));
    }
    let keeper = Arc::new(Keeper::default());
    let (kept, owned) = (Arc::clone(&keeper), command.to_vec());
    std::thread::Builder::new()
        .name("tokens".to_owned())
        .spawn(move || kept.keep(&owned))
        .map_err(|error| format!("starting the token command's thread: {error}"))?;
    keepers.insert(command.to_vec(), Arc::clone(&keeper));
    Ok(keeper)
}

/// The value of [`TOKEN_PROPERTY`] for a command.
pub fn property_of(command: &[String]) -> String {
    serde_json::json!(command).to_string()
}

fn command_of(property: Option<&str>) -> Option<Vec<String>> {
    property.and_then(|text| serde_json::from_str(text).ok())
}

/// Implements [`ClientContext::generate_oauth_token`], which a client calls when it is polled and its token
/// is due.
///
/// # Errors
/// When there is no command, or it creates no token.
pub fn generate(property: Option<&str>) -> Result<OAuthToken, Box<dyn std::error::Error>> {
    let command = command_of(property).ok_or("kafka.token_command is not set")?;
    let token = keeper(&command)?.token()?;
    Ok(OAuthToken { token: token.text, principal_name: token.principal, lifetime_ms: token.expires_at_ms })
}

/// Gives a new client its first token, if a token command is set. Without a token the client connects to no
/// broker, and it requests one only when it is polled, which may be too late. Waits until the command has
/// ended once. If it created no token, that was logged, and the client requests one later.
pub fn authorize<C: ClientContext>(config: &ClientConfig, client: &Client<C>) {
    let Some(command) = command_of(config.get(TOKEN_PROPERTY)) else { return };
    let Ok(token) = keeper(&command).and_then(|keeper| keeper.token()) else { return };
    if let Err(code) = set_token(client, &token.text, &token.principal, token.expires_at_ms) {
        tracing::warn!(%code, "the client library rejected the token");
    }
}

/// Runs the token command once, if one is set, beside whoever keeps its token.
///
/// # Errors
/// Why it makes none.
pub fn try_command(kafka: &KafkaSettings) -> Result<(), String> {
    match kafka.token_command.as_slice() {
        [] => Ok(()),
        command => {
            run(command).map(drop).map_err(|reason| format!("the token command created no token: {reason}"))
        }
    }
}

/// Waits for the first token, if a token command is set, so that creating a client does not wait for it.
///
/// # Errors
/// Why there is none.
pub fn first_token(kafka: &KafkaSettings) -> Result<(), String> {
    match kafka.token_command.as_slice() {
        [] => Ok(()),
        command => keeper(command)?.token().map(drop),
    }
}

#[cfg(test)]
mod tests;
