//! Connection string of the database; its display form hides the password.

use std::fmt;

use super::endpoint::Endpoint;
use super::secret::Secret;

/// A validated `postgres://…` URL; displayed without its password.
#[derive(Clone)]
pub struct PostgresUrl {
    text: Secret,
    endpoint: Endpoint,
}

impl PostgresUrl {
    /// Parses a URL. The error contains no part of the URL, because the password may be anywhere in it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let endpoint = Endpoint::parse(text).map_err(|error| error.to_string())?;
        Ok(Self { text: Secret::new(text), endpoint })
    }

    /// The parsed endpoint.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}

impl PartialEq for PostgresUrl {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

// User, hosts, ports and database.
impl fmt::Display for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "postgres://{}", self.endpoint)
    }
}

impl fmt::Debug for PostgresUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shown_connection_string_has_no_password() {
        let url =
            PostgresUrl::parse("postgresql://writer:hunter2@db1:5433,db2:5434/payments?connect_timeout=5")
                .unwrap();
        assert_eq!(url.to_string(), "postgres://writer@db1:5433,db2:5434/payments");
        assert!(!format!("{url:?}").contains("hunter2"));
    }

    #[test]
    fn a_refused_connection_string_is_not_repeated() {
        for text in ["postgresql://writer:hunter2@db/x?hunter2=1", "hunter2", "postgresql://w:h@:x:hunter2/"]
        {
            assert!(!PostgresUrl::parse(text).unwrap_err().contains("hunter2"));
        }
    }
}
