use std::time::Duration;

use tokio_postgres::config::{SslMode, TargetSessionAttrs};

use super::parameters::{NOT_SUPPORTED, WITHOUT_EFFECT};
use super::tls::Verify;
use super::*;

fn refusal(url: &str) -> String {
    Endpoint::parse(url).map(|e| e.to_string()).unwrap_err().to_string()
}

#[test]
fn a_url_is_shown_without_its_password() {
    let endpoint = Endpoint::parse("postgres://writer:s3cret@db1:5433,db2:5434/payments").unwrap();
    assert_eq!(endpoint.to_string(), "writer@db1:5433,db2:5434/payments");
    assert!(!format!("{endpoint:?}").contains("s3cret"));
}

#[test]
fn a_refused_url_never_repeats_the_password() {
    for url in [
        "mysql://writer:s3cret@db/payments",
        "writer:s3cret@db/payments",
        "postgres://writer:s3cret/x@db:port/payments",
        "postgres://writer:x@s3cret=1@db:5432/payments",
        "postgres://writer:x?s3cret=1@db/payments?no_such_option=1",
        "postgres://writer:x@db/payments?s3cret=1",
        "postgres://writer:s3cret@db/payments?sslmode=maybe",
        "postgres://writer:s3cret@db/payments?connect_timeout=s3cret",
        "host=db password=s3cret",
        "postgres://writer:w@:x:s3cret/",
        "s3cret",
    ] {
        let text = refusal(url);
        assert!(!text.contains("s3cret"), "{url}: {text}");
    }
}

#[test]
fn a_refused_url_says_what_is_wrong() {
    assert!(refusal("host=db").contains("postgres://"));
    assert!(refusal("postgres://db/x?sslmode=maybe").contains("verify-full"));
    assert!(refusal("postgres://db:70000/x").contains("port"));
    assert!(refusal("postgres:///x").contains("no host"));
    assert!(refusal("postgres://db/x?sslrootcert=/no/such%20file").contains("/no/such file"));
}

#[test]
fn tls_parameters_mean_what_they_mean_to_libpq() {
    let cases = [
        ("", SslMode::Prefer, Verify::Nothing),
        ("?sslmode=disable", SslMode::Disable, Verify::Nothing),
        ("?sslmode=prefer", SslMode::Prefer, Verify::Nothing),
        ("?sslmode=allow", SslMode::Prefer, Verify::Nothing),
        ("?ssl=true", SslMode::Require, Verify::Nothing),
        ("?sslmode=verify-ca&ssl=true", SslMode::Require, Verify::Issuer),
        ("?sslmode=require", SslMode::Require, Verify::Nothing),
        ("?sslmode=require&sslrootcert=system", SslMode::Require, Verify::Issuer),
        ("?connect_timeout=3&sslmode=verify-ca", SslMode::Require, Verify::Issuer),
        ("?sslmode=verify-full&sslrootcert=system", SslMode::Require, Verify::IssuerAndHost),
    ];
    for (query, mode, verify) in cases {
        let url = format!("postgres://u:p?w@db/x{query}");
        let endpoint = Endpoint::parse(&url).unwrap();
        assert_eq!((endpoint.config.get_ssl_mode(), endpoint.tls.verify()), (mode, verify), "{query}");
    }
}

#[test]
fn parameters_of_the_url_override_the_defaults() {
    let config = |url| Endpoint::parse(url).unwrap().config;
    let default = config("postgres://u@db/x");
    assert_eq!(default.get_application_name(), Some("payment-writer"));
    assert_eq!(default.get_connect_timeout(), Some(&Duration::from_secs(5)));
    assert_eq!(default.get_tcp_user_timeout(), Some(&Duration::from_secs(20)));
    assert_eq!(default.get_keepalives_idle(), Duration::from_secs(15));
    assert_eq!(default.get_keepalives_interval(), Some(Duration::from_secs(5)));
    assert_eq!(default.get_keepalives_retries(), Some(3));
    let set = config("postgres://u@db/x?application_name=other&connect_timeout=1");
    assert_eq!(set.get_application_name(), Some("other"));
    assert_eq!(set.get_connect_timeout(), Some(&Duration::from_secs(1)));
}

#[test]
fn parameters_of_libpq_are_taken_ignored_or_refused_by_name() {
    let parse = |query: &str| Endpoint::parse(&format!("postgres://u:p@db/x?{query}"));
    let taken = parse(
        "keepalives_count=7&fallback_application_name=other&client_encoding=UTF8&target_session_attrs=primary",
    )
    .unwrap();
    assert_eq!(taken.config.get_keepalives_retries(), Some(7));
    assert_eq!(taken.config.get_application_name(), Some("other"));
    assert_eq!(taken.config.get_target_session_attrs(), TargetSessionAttrs::ReadWrite);
    assert!(taken.ignored.is_empty());
    let both = parse("application_name=mine&fallback_application_name=other").unwrap();
    assert_eq!(both.config.get_application_name(), Some("mine"));
    let standby = parse("target_session_attrs=standby").unwrap();
    assert_eq!(standby.config.get_target_session_attrs(), TargetSessionAttrs::ReadOnly);

    for name in WITHOUT_EFFECT {
        assert_eq!(parse(&format!("{name}=1")).unwrap().ignored, [name]);
    }
    for name in NOT_SUPPORTED {
        assert!(refusal(&format!("postgres://u:p@db/x?{name}=1")).contains(name), "{name}");
    }
    for (parameter, name) in [
        ("target_session_attrs=prefer-standby", "prefer-standby"),
        ("client_encoding=LATIN1", "client_encoding"),
        ("gssencmode=require", "gssencmode"),
        ("ssl=yes", "sslmode"),
    ] {
        let text = refusal(&format!("postgres://u:p@db/x?{parameter}"));
        assert!(text.contains(name), "{text}");
    }
}

#[test]
fn the_password_file_is_read_again_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("passwords");
    let url = format!("postgres://u@db1,db2:6000/x?passfile={}", path.display());
    assert!(refusal(&url).contains("passwords"));
    std::fs::write(&path, "# comment\ndb1:5433:x:u:no\nother:*:*:*:no\n").unwrap();
    assert!(refusal(&url).contains("no line fits"));
    for (hosts, line, password) in [
        ("db1", "db1:*:x:u:one", "one"),
        ("db2:6000", "db2:6000:*:u:with\\:colon\\\\", "with:colon\\"),
        ("db1,db2:6000", "*:*:*:*:any:rest", "any"),
        // The password of one host is not given to another.
        ("db1,db2:6000", "db1:*:x:u:one", "later"),
    ] {
        std::fs::write(&path, format!("no:*:*:*:no\n{line}\n*:*:*:*:later\n")).unwrap();
        let url = url.replace("db1,db2:6000", hosts);
        assert_eq!(Endpoint::parse(&url).unwrap().password().unwrap().as_deref(), Some(password), "{line}");
    }
    let endpoint = Endpoint::parse(&url).unwrap();
    std::fs::write(&path, "*:*:x:u:changed").unwrap();
    assert_eq!(endpoint.password().unwrap().as_deref(), Some("changed"));
    // A password of the URL precedes it.
    let url = url.replace("u@", "u:p@");
    assert_eq!(Endpoint::parse(&url).unwrap().password_file, None);
}
