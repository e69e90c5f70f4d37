//! TLS of a Postgres URL. The files that it names are read again for each connection, so that new certificates are used.

use openssl::ssl::{SslConnector, SslFiletype, SslMethod, SslVerifyMode};
use openssl::x509::store::X509StoreBuilder;
use postgres_openssl::{MakeTlsConnector, set_postgresql_alpn};
use tokio_postgres::config::{SslMode, SslNegotiation};

use super::parameters::OwnParameters;
use super::{EndpointError, invalid};

/// How the server's certificate is verified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verify {
    Nothing,
    Issuer,
    IssuerAndHost,
}

/// How connections are secured.
#[derive(Clone, PartialEq)]
pub(crate) struct Tls {
    verify: Verify,
    negotiation: SslNegotiation,
    root_file: Option<String>,
    certificate_file: Option<String>,
    key_file: Option<String>,
}

impl Tls {
    pub(super) fn of(
        own: &OwnParameters,
        negotiation: SslNegotiation,
    ) -> Result<(SslMode, Self), EndpointError> {
        let file = |name| own.get(name).cloned();
        let (mode, verify) = mode_and_verify(own)?;
        // By default, those of the system are trusted.
        let root_file = file("sslrootcert").filter(|path| path != "system");
        let (certificate_file, key_file) = (file("sslcert"), file("sslkey"));
        Ok((mode, Self { verify, negotiation, root_file, certificate_file, key_file }))
    }

    #[cfg(test)]
    pub(super) fn verify(&self) -> Verify {
        self.verify
    }

    /// Reads the files.
    pub(crate) fn connector(&self) -> Result<MakeTlsConnector, EndpointError> {
        let file = |parameter, path: &String| {
            let path = path.clone();
            move |source| EndpointError::TlsFile { parameter, path, source }
        };
        let mut builder = SslConnector::builder(SslMethod::tls_client())?;
        if let Some(path) = &self.root_file {
            // Replaces the system's certificates: only the issuers in the file are trusted.
            builder.set_cert_store(X509StoreBuilder::new()?.build());
            builder.set_ca_file(path).map_err(file("sslrootcert", path))?;
        }
        if let Some(path) = &self.certificate_file {
            builder.set_certificate_chain_file(path).map_err(file("sslcert", path))?;
        }
        if let Some(path) = &self.key_file {
            builder.set_private_key_file(path, SslFiletype::PEM).map_err(file("sslkey", path))?;
        }
        if self.negotiation == SslNegotiation::Direct {
            set_postgresql_alpn(&mut builder)?;
        }
        builder.set_verify(match self.verify {
            Verify::Nothing => SslVerifyMode::NONE,
            Verify::Issuer | Verify::IssuerAndHost => SslVerifyMode::PEER,
        });
        let verifies_host = self.verify == Verify::IssuerAndHost;
        let mut connector = MakeTlsConnector::new(builder.build());
        connector.set_callback(move |session, _host| {
            session.set_verify_hostname(verifies_host);
            Ok(())
        });
        Ok(connector)
    }
}

fn mode_and_verify(tls: &OwnParameters) -> Result<(SslMode, Verify), EndpointError> {
    match tls.get("sslmode").map(String::as_str) {
        Some("disable") => Ok((SslMode::Disable, Verify::Nothing)),
        None | Some("prefer" | "allow") => Ok((SslMode::Prefer, Verify::Nothing)),
        Some("require") if tls.contains_key("sslrootcert") => Ok((SslMode::Require, Verify::Issuer)),
        Some("require") => Ok((SslMode::Require, Verify::Nothing)),
        Some("verify-ca") => Ok((SslMode::Require, Verify::Issuer)),
        Some("verify-full") => Ok((SslMode::Require, Verify::IssuerAndHost)),
        Some(_) => Err(invalid("sslmode is none of disable, allow, prefer, require, verify-ca, verify-full")),
    }
}
