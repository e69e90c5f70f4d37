//! The history of applied steps.

use tokio_postgres::Client;

use super::{HISTORY, SchemaError, SchemaVersion, doing, known, migrations, value};

/// An applied or pending step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StepStatus {
    /// The step's number.
    pub version: SchemaVersion,
    /// The step's name, without number and extension.
    pub name: String,
    /// Whether it was applied.
    pub state: StepState,
}

/// Whether a step was applied.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StepState {
    /// Applied at this time (RFC 3339, by the clock of the machine that ran it).
    Applied(String),
    /// Applied at this time with another name or checksum than this program's step.
    Divergent(String),
    /// Applied at this time; newer than this program.
    Unknown(String),
    /// Known to this program and not applied.
    Pending,
}

/// The history of a database with the pending steps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// All steps, by number.
    pub steps: Vec<StepStatus>,
}

impl Status {
    /// The last applied step; `None` if there is none.
    pub fn version(&self) -> Option<SchemaVersion> {
        self.steps.iter().filter(|s| s.state != StepState::Pending).map(|s| s.version).max()
    }

    pub(super) fn pending(&self) -> bool {
        self.steps.iter().any(|s| s.state == StepState::Pending)
    }

    /// Fails if an applied step differs from this program's.
    pub(super) fn agrees(&self) -> Result<(), SchemaError> {
        match self.steps.iter().find(|s| matches!(s.state, StepState::Divergent(_))) {
            None => Ok(()),
            Some(step) => Err(step.divergence()),
        }
    }
}

impl StepStatus {
    /// The error for an applied step that differs from this program's.
    pub(super) fn divergence(&self) -> SchemaError {
        SchemaError::Divergent {
            version: self.version,
            applied: self.name.clone(),
            known: known(self.version).map(|s| s.name.to_owned()).unwrap_or_default(),
        }
    }
}

/// Reads the history and adds the pending steps. Needs only the right to read the history.
pub async fn status(client: &Client) -> Result<Status, SchemaError> {
    const DOING: &str = "cannot read the history of the schema";
    // Fails with 42501 if the role may not use the schema, instead of reporting it as absent.
    let exists: bool = value(client, DOING, "SELECT to_regclass($1) IS NOT NULL", &[&HISTORY]).await?;
    let mut pending = migrations()?;
    let mut steps = Vec::new();
    if exists {
        let select = format!("SELECT version, name, applied_on, checksum FROM {HISTORY} ORDER BY version");
        for row in client.query(&select, &[]).await.map_err(doing(DOING))? {
            let (version, name, applied_on): (i32, String, String) = (row.get(0), row.get(1), row.get(2));
            let checksum: &str = row.get(3);
            let step = pending.iter().position(|m| m.version() == version).map(|at| pending.remove(at));
            let state = match step {
                None => StepState::Unknown(applied_on),
                Some(m) if m.checksum().to_string() == checksum && m.name() == name => {
                    StepState::Applied(applied_on)
                }
                Some(_) => StepState::Divergent(applied_on),
            };
            steps.push(StepStatus { version: SchemaVersion(version), name, state });
        }
    }
    steps.extend(pending.iter().map(|m| StepStatus {
        version: SchemaVersion(m.version()),
        name: m.name().to_owned(),
        state: StepState::Pending,
    }));
    steps.sort_by_key(|s| s.version);
    Ok(Status { steps })
}
