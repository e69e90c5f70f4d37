//! SASL: how a connection shows who it is and, with SCRAM, has the broker show that it knows the password too.
//!
//! User names and passwords go as they are. RFC 5802 wants them prepared (SASLprep), which neither Kafka nor
//! librdkafka does: a prepared password would be another one wherever that changes it.

use std::mem;
use std::sync::Arc;

use openssl::base64::{decode_block, encode_block};
use openssl::error::ErrorStack;
use openssl::hash::{MessageDigest, hash};
use openssl::memcmp;
use openssl::pkcs5::pbkdf2_hmac;
use openssl::pkey::PKey;
use openssl::rand::rand_bytes;
use openssl::sign::Signer;

use crate::config::Secret;

/// RFC 7677: fewer make the password cheap to guess from what was sent.
const ITERATIONS_MIN: usize = 4096;
/// What librdkafka allows too: a broker cannot keep us busy for minutes.
const ITERATIONS_MAX: usize = 1_000_000;
/// Bytes of randomness in a nonce; a multiple of three, so that base64 does not pad it.
const NONCE_BYTES: usize = 24;

/// Why an exchange came to nothing. No variant holds anything of the password.
#[derive(Debug, thiserror::Error)]
pub enum SaslError {
    /// The broker does not accept us, in its own words.
    #[error("the broker says {0}")]
    Refused(String),
    /// Whoever answers does not know the password, and so is not the broker.
    #[error("the broker cannot prove that it knows the password")]
    Impostor,
    /// The broker does not keep to the protocol.
    #[error("{0}")]
    Protocol(&'static str),
    /// OpenSSL cannot compute what is needed.
    #[error("cannot compute a SASL message: {0}")]
    Crypto(#[from] ErrorStack),
}

/// How one shows who one is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mechanism {
    Plain,
    ScramSha256,
    ScramSha512,
}

impl Mechanism {
    const ALL: [Self; 3] = [Self::Plain, Self::ScramSha256, Self::ScramSha512];

    /// The mechanism of that name, if it is known here. Case counts, as in librdkafka.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mechanism| mechanism.name() == name)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }

    fn digest(self) -> MessageDigest {
        match self {
            Self::Plain | Self::ScramSha256 => MessageDigest::sha256(),
            Self::ScramSha512 => MessageDigest::sha512(),
        }
    }
}

/// Who one is.
pub(super) struct Login {
    pub(super) mechanism: Mechanism,
    pub(super) username: String,
    pub(super) password: Secret,
}

/// What to do after an answer of the broker.
pub enum Step {
    /// Send this, and hand over what is answered.
    Send(Vec<u8>),
    /// The connection is authenticated.
    Done,
}

enum State {
    Fresh,
    Plain,
    /// Waits for salt and iterations.
    ScramFirst {
        nonce: String,
        /// `client-first-message-bare`.
        bare: String,
    },
    /// Waits for this signature, in base64.
    ScramFinal {
        signature: String,
    },
    Over,
}

/// The exchange that one connection begins with.
pub struct Exchange {
    login: Arc<Login>,
    state: State,
}

impl Exchange {
    pub(super) fn new(login: Arc<Login>) -> Self {
        Self { login, state: State::Fresh }
    }

    /// The mechanism's name, for the handshake that comes before.
    pub fn mechanism(&self) -> &'static str {
        self.login.mechanism.name()
    }

    /// The first message. Called again, it begins the exchange anew.
    pub fn first(&mut self) -> Result<Vec<u8>, SaslError> {
        let mut random = [0; NONCE_BYTES];
        rand_bytes(&mut random)?;
        Ok(self.first_with(encode_block(&random)))
    }

    fn first_with(&mut self, nonce: String) -> Vec<u8> {
        let username = &self.login.username;
        if self.login.mechanism == Mechanism::Plain {
            self.state = State::Plain;
            return format!("\0{username}\0{}", self.login.password.expose()).into_bytes();
        }
        let username = username.replace('=', "=3D").replace(',', "=2C");
        let bare = format!("n={username},r={nonce}");
        // No channel binding: Kafka offers none.
        let message = format!("n,,{bare}").into_bytes();
        self.state = State::ScramFirst { nonce, bare };
        message
    }

    /// What follows the broker's answer to the last message.
    pub fn next(&mut self, server: &[u8]) -> Result<Step, SaslError> {
        match mem::replace(&mut self.state, State::Over) {
            // A broker that refuses says so by the error code of its answer.
            State::Plain => Ok(Step::Done),
            State::ScramFirst { nonce, bare } => {
                let (message, signature) = self.prove(&nonce, &bare, text_of(server)?)?;
                self.state = State::ScramFinal { signature };
                Ok(Step::Send(message.into_bytes()))
            }
            State::ScramFinal { signature } => {
                let theirs = attribute(text_of(server)?, "v=")
                    .ok_or(SaslError::Protocol("the broker sent no signature"))?;
                // The comparison panics if the lengths differ.
                let is_same =
                    theirs.len() == signature.len() && memcmp::eq(theirs.as_bytes(), signature.as_bytes());
                if is_same { Ok(Step::Done) } else { Err(SaslError::Impostor) }
            }
            State::Fresh | State::Over => Err(SaslError::Protocol("a SASL message out of turn")),
        }
    }

    /// The final message, and the signature with which the broker has to answer it.
    fn prove(&self, nonce: &str, bare: &str, server_first: &str) -> Result<(String, String), SaslError> {
        if attribute(server_first, "m=").is_some() {
            return Err(SaslError::Protocol("the broker demands a SCRAM extension that is not known"));
        }
        let server_nonce = attribute(server_first, "r=")
            .filter(|theirs| theirs.len() > nonce.len() && theirs.starts_with(nonce))
            .ok_or(SaslError::Protocol("the broker's nonce does not continue ours"))?;
        let salt = attribute(server_first, "s=")
            .and_then(|salt| decode_block(salt).ok())
            .filter(|salt| !salt.is_empty())
            .ok_or(SaslError::Protocol("the broker sent no valid salt"))?;
        let iterations = attribute(server_first, "i=")
            .and_then(|count| count.parse().ok())
            .filter(|count| (ITERATIONS_MIN..=ITERATIONS_MAX).contains(count))
            .ok_or(SaslError::Protocol("the broker's SCRAM iterations are not from 4096 to 1000000"))?;

        let digest = self.login.mechanism.digest();
        let mut salted = vec![0; digest.size()];
        pbkdf2_hmac(self.login.password.expose().as_bytes(), &salt, iterations, digest, &mut salted)?;
        // "biws" is "n,,", what our first message began with.
        let unproven = format!("c=biws,r={server_nonce}");
        let signed = format!("{bare},{server_first},{unproven}");
        let client_key = hmac(digest, &salted, "Client Key")?;
        let client_signature = hmac(digest, &hash(digest, &client_key)?, &signed)?;
        let proof: Vec<u8> = client_key.iter().zip(&client_signature).map(|(key, mask)| key ^ mask).collect();
        let server_key = hmac(digest, &salted, "Server Key")?;
        let signature = encode_block(&hmac(digest, &server_key, &signed)?);
        Ok((format!("{unproven},p={}", encode_block(&proof)), signature))
    }
}

fn hmac(digest: MessageDigest, key: &[u8], text: &str) -> Result<Vec<u8>, ErrorStack> {
    let key = PKey::hmac(key)?;
    Signer::new(digest, &key)?.sign_oneshot_to_vec(text.as_bytes())
}

/// A message of the broker, unless it tells of an error.
fn text_of(server: &[u8]) -> Result<&str, SaslError> {
    let text = std::str::from_utf8(server).map_err(|_| SaslError::Protocol("a SCRAM message is not text"))?;
    match attribute(text, "e=") {
        Some(error) => Err(SaslError::Refused(error.to_owned())),
        None => Ok(text),
    }
}

/// The value of an attribute, whose name is given with its `=`.
fn attribute<'m>(message: &'m str, name: &str) -> Option<&'m str> {
    message.split(',').find_map(|attribute| attribute.strip_prefix(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONCE: &str = "rOprNGfwEbeRWgbNEkqO";
    const SERVER_FIRST: &str =
        "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
    const SERVER_FINAL: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

    fn exchange(mechanism: Mechanism, username: &str, password: &str) -> Exchange {
        let (username, password) = (username.to_owned(), Secret::new(password));
        Exchange::new(Arc::new(Login { mechanism, username, password }))
    }

    /// The exchange of RFC 7677, begun.
    fn begun(password: &str) -> Exchange {
        let mut exchange = exchange(Mechanism::ScramSha256, "user", password);
        assert_eq!(exchange.first_with(NONCE.to_owned()), b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        exchange
    }

    fn sent(step: Result<Step, SaslError>) -> String {
        match step {
            Ok(Step::Send(message)) => String::from_utf8(message).unwrap(),
            Ok(Step::Done) => panic!("done"),
            Err(error) => panic!("{error}"),
        }
    }

    fn refusal(step: Result<Step, SaslError>) -> String {
        step.err().map(|error| error.to_string()).unwrap()
    }

    #[test]
    fn scram_sha_256_is_that_of_rfc_7677() {
        let mut exchange = begun("pencil");
        assert_eq!(exchange.mechanism(), "SCRAM-SHA-256");
        assert_eq!(
            sent(exchange.next(SERVER_FIRST.as_bytes())),
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
             p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        assert!(matches!(exchange.next(SERVER_FINAL.as_bytes()), Ok(Step::Done)));
        assert_eq!(refusal(exchange.next(SERVER_FINAL.as_bytes())), "a SASL message out of turn");
    }

    /// There is no vector of an RFC; computed with Python's `hashlib` and `hmac`. The password is not ASCII, and
    /// SASLprep would change it.
    #[test]
    fn scram_sha_512_takes_the_password_as_it_is() {
        let mut exchange = exchange(Mechanism::ScramSha512, "a=b,c", "p\u{e4}ss\u{a0}w\u{fb01}rd");
        assert_eq!(exchange.mechanism(), "SCRAM-SHA-512");
        assert_eq!(exchange.first_with(NONCE.to_owned()), b"n,,n=a=3Db=2Cc,r=rOprNGfwEbeRWgbNEkqO");
        let first = SERVER_FIRST.replace("4096", "8192");
        assert_eq!(sent(exchange.next(first.as_bytes())), SHA_512_CLIENT_FINAL);
        assert!(matches!(exchange.next(SHA_512_SERVER_FINAL.as_bytes()), Ok(Step::Done)));
    }

    const SHA_512_CLIENT_FINAL: &str = "\
        c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
        p=DVLyUiha66Y3HxpFljPKVi8w5YIrxju/G5CCIcnb3o8OT7V2WeDeXECqtrQYPKwqGOmo9wjKetO8pVQASstn8w==";
    const SHA_512_SERVER_FINAL: &str =
        "v=x/2A7VeVfUVI1J+369tQzhabc0PJh+lY1m1Y97mb5/K6ZWJJFUHGw044l0DN0kmCL9N5ydC6qcmfqAxTiJ2edg==";

    #[test]
    fn a_broker_that_does_not_know_the_password_is_refused() {
        for wrong in [
            "v=7rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=",
            "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4",
            "v=",
        ] {
            let mut exchange = begun("pencil");
            sent(exchange.next(SERVER_FIRST.as_bytes()));
            assert!(matches!(exchange.next(wrong.as_bytes()), Err(SaslError::Impostor)), "{wrong}");
        }
        let mut exchange = begun("another");
        sent(exchange.next(SERVER_FIRST.as_bytes()));
        assert!(matches!(exchange.next(SERVER_FINAL.as_bytes()), Err(SaslError::Impostor)));
    }

    #[test]
    fn a_broker_that_gives_no_signature_is_refused() {
        for (answer, refused) in [
            ("e=invalid-proof", "the broker says invalid-proof"),
            ("", "the broker sent no signature"),
            ("x=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=", "the broker sent no signature"),
        ] {
            let mut exchange = begun("pencil");
            sent(exchange.next(SERVER_FIRST.as_bytes()));
            assert_eq!(refusal(exchange.next(answer.as_bytes())), refused);
        }
    }

    #[test]
    fn a_first_answer_that_is_not_valid_is_refused() {
        let nonce = "the broker's nonce does not continue ours";
        let salt = "the broker sent no valid salt";
        let iterations = "the broker's SCRAM iterations are not from 4096 to 1000000";
        for (found, put, refused) in [
            ("r=rOp", "r=rOq", nonce),
            ("%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0", "", nonce),
            ("r=", "q=", nonce),
            ("s=W22ZaJ0SNY7soEsUEjb6gQ==", "s=", salt),
            ("s=W22ZaJ0SNY7soEsUEjb6gQ==", "s=W22Z!", salt),
            (",s=W22ZaJ0SNY7soEsUEjb6gQ==", "", salt),
            ("i=4096", "i=4095", iterations),
            ("i=4096", "i=0", iterations),
            ("i=4096", "i=-1", iterations),
            ("i=4096", "i=1000001", iterations),
            ("i=4096", "i=99999999999999999999999", iterations),
            (",i=4096", "", iterations),
            ("r=rOp", "m=x,r=rOp", "the broker demands a SCRAM extension that is not known"),
            ("r=rOp", "e=unknown-user,r=rOp", "the broker says unknown-user"),
        ] {
            let answer = SERVER_FIRST.replacen(found, put, 1);
            assert_ne!(answer, SERVER_FIRST);
            assert_eq!(refusal(begun("pencil").next(answer.as_bytes())), refused, "{answer}");
        }
        assert_eq!(refusal(begun("pencil").next(b"\xff")), "a SCRAM message is not text");
    }

    #[test]
    fn nonces_are_not_used_twice_and_have_no_comma() {
        let mut exchange = exchange(Mechanism::ScramSha256, "user", "pencil");
        let (one, other) = (exchange.first().unwrap(), exchange.first().unwrap());
        assert_ne!(one, other);
        let one = String::from_utf8(one).unwrap();
        assert_eq!(one.strip_prefix("n,,n=user,r=").map(str::len), Some(32));
        assert_eq!(one.matches(',').count(), 3);
    }

    #[test]
    fn plain_sends_name_and_password_and_takes_any_answer() {
        let mut exchange = exchange(Mechanism::Plain, "a,b", "c=d");
        assert_eq!(exchange.mechanism(), "PLAIN");
        assert_eq!(refusal(exchange.next(b"")), "a SASL message out of turn");
        assert_eq!(exchange.first().unwrap(), b"\0a,b\0c=d");
        assert!(matches!(exchange.next(b""), Ok(Step::Done)));
    }

    #[test]
    fn mechanisms_are_known_by_their_exact_names() {
        for mechanism in Mechanism::ALL {
            assert_eq!(Mechanism::named(mechanism.name()), Some(mechanism));
        }
        for unknown in ["GSSAPI", "OAUTHBEARER", "SCRAM-SHA-1", "plain", ""] {
            assert_eq!(Mechanism::named(unknown), None);
        }
    }
}
