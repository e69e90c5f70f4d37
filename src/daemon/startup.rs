//! Waits at the start for the database and the broker.

use std::sync::Arc;
use std::time::Duration;

use rdkafka::consumer::Consumer;
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};
use uuid::Uuid;

use super::{Daemon, REQUEST_TIMEOUT, RunError, ask};
use crate::domain::cursor::Identity;
use crate::domain::outcome::{FailureClass, class_of_sqlstate};
use crate::kafka::client::{CLIENT_MAX, creating};
use crate::kafka::group::{Group, LaneHandle, MemberEnd};
use crate::kafka::librdkafka::topic_id;
use crate::kafka::publisher_settings::PublisherSettings;
use crate::kafka::topic_rules::{self, Action};
use crate::lane::backoff::Backoff;
use crate::postgres::binding::{self, Binding, BindingError};
use crate::postgres::connection::{backend_pid, class_of, describe};
use crate::postgres::schema::{self, SchemaError};
use crate::postgres::waits::{Waits, with_reason};
use crate::secrets::READ_MAX;
use crate::telemetry::metrics;
use crate::telemetry::status::Dependency;

const BINDING: &str = "binding the database to the group";
const BINDING_TIMEOUT: Duration = Duration::from_secs(60);

/// Identity of the cluster and the topic at the start.
pub(super) struct Found {
    pub topic_id: Uuid,
    pub cluster_id: String,
    pub partitions: usize,
}

/// Why an attempt failed.
enum AttemptError {
    /// Waiting does not help.
    Final(RunError),
    Retried(FailureClass, String),
}

/// Repeats an attempt, with backoff, until the dependency answers.
async fn until_it_answers<T>(
    dependency: &'static str,
    doing: &str,
    probed: impl Fn(Dependency),
    attempt: impl AsyncFn() -> Result<T, AttemptError>,
) -> Result<T, RunError> {
    let mut backoff = Backoff::new(dependency, 0);
    loop {
        match attempt().await {
            Ok(answer) => {
                backoff.succeeded();
                metrics::breaker_at_start(dependency, false);
                probed(Dependency::Up);
                return Ok(answer);
            }
            Err(AttemptError::Final(error)) => return Err(error),
            Err(AttemptError::Retried(class, message)) => {
                backoff.failed(class, doing, &message);
                metrics::breaker_at_start(dependency, true);
                probed(Dependency::Down(message));
            }
        }
        sleep_until(backoff.due_at()).await;
    }
}

impl Daemon<'_> {
    /// Waits for a database with a schema that this version knows; returns its id.
    pub(super) async fn database_ready(&self) -> Result<Uuid, RunError> {
        let attempt = async || {
            let endpoint = &self.settings.postgres.url;
            let connected = endpoint.connect().await;
            let (client, _driver) = connected.map_err(|e| AttemptError::Retried(e.class(), e.to_string()))?;
            schema::check(&client).await.map_err(|error| match error {
                // The schema of a newer version stays.
                SchemaError::TooNew { .. } => AttemptError::Final(RunError::Failed(error.to_string())),
                // A missing or old schema: wait for the operator to migrate it.
                _ => {
                    let sqlstate = error.sqlstate().map_or("42P01", |s| s.code());
                    AttemptError::Retried(class_of_sqlstate(sqlstate, None), error.to_string())
                }
            })?;
            let id = binding::database_id(&client).await;
            id.map_err(|error| AttemptError::Retried(class_of(&error), describe(&error)))
        };
        let probed = |database| self.status.probed(Some(database), None);
        until_it_answers("database", "reading the identity of the database", probed, attempt).await
    }

    /// Creates the group's member. The first start fails if the client cannot be created; later a certificate may be
    /// there before its key.
    pub(super) async fn member(
        &self,
        handles: &[LaneHandle],
    ) -> Result<(Group, watch::Receiver<Option<MemberEnd>>), RunError> {
        let doing = "creating the Kafka consumer";
        let attempt = async || {
            let (kafka, handles) = (self.settings.kafka.clone(), handles.to_vec());
            let status = Arc::clone(self.status);
            match creating(CLIENT_MAX, move || Group::new(&kafka, handles, status)).await {
                Ok(Ok(created)) => Ok(created),
                Ok(Err(error)) if self.is_first => {
                    Err(AttemptError::Final(RunError::Failed(format!("{doing}: {error}"))))
                }
                Ok(Err(error)) => Err(AttemptError::Retried(FailureClass::Persistent, error.to_string())),
                Err(error) => Err(AttemptError::Retried(FailureClass::Transient, error)),
            }
        };
        let probed = |broker| {
            if let Dependency::Down(_) = broker {
                self.status.probed(None, Some(broker));
            }
        };
        until_it_answers("broker", doing, probed, attempt).await
    }

    /// Settings of the lanes' publishers, which have the password.
    pub(super) async fn publishers(&self, identity: &Identity) -> Result<Vec<PublisherSettings>, RunError> {
        let attempt = async || {
            let (kafka, identity, lanes) =
                (self.settings.kafka.clone(), identity.clone(), self.settings.lanes);
            let of = move |lane| PublisherSettings::of(&kafka, &identity, lane);
            let made = creating(READ_MAX, move || (0..lanes).map(of).collect()).await;
            made.map_err(|error| AttemptError::Retried(FailureClass::Transient, error))
        };
        until_it_answers("broker", "reading the password for Kafka", |_| {}, attempt).await
    }

    /// Waits for a broker that knows the input topic.
    pub(super) async fn broker_ready(&self, group: &Group) -> Result<Found, RunError> {
        let attempt = async || {
            let asked = ask(group, |group| {
                let (topic_id, partitions) = topic_id(group.consumer(), group.topic(), REQUEST_TIMEOUT)
                    .map_err(|error| format!("topic {}: {error}", group.topic()))?;
                let cluster_id = group.consumer().client().fetch_cluster_id(REQUEST_TIMEOUT);
                let cluster_id = cluster_id.ok_or("the cluster does not report its id")?;
                let checked = topic_rules::check(group.consumer().client(), group.settings());
                Ok::<_, String>((Found { topic_id, cluster_id, partitions }, checked))
            });
            match asked.await {
                Ok(Ok((found, checked))) => {
                    let refused = checked.into_iter().filter(|checked| checked.rule.action == Action::Refuse);
                    let refused: Vec<String> =
                        refused.filter_map(|checked| checked.violation.ok()?).collect();
                    match refused.is_empty() {
                        true => Ok(found),
                        false => Err(AttemptError::Retried(FailureClass::Persistent, refused.join("; "))),
                    }
                }
                Ok(Err(message)) => {
                    group.listen();
                    Err(match self.status.broker_refusal() {
                        Some(refusal) => AttemptError::Retried(FailureClass::Persistent, refusal),
                        None => AttemptError::Retried(FailureClass::Transient, message),
                    })
                }
                Err(error) => {
                    let message = format!("asking for the input topic: {error}");
                    Err(AttemptError::Final(RunError::Failed(message)))
                }
            }
        };
        let probed = |broker| self.status.probed(None, Some(broker));
        let found = until_it_answers("broker", "asking for the input topic", probed, attempt).await?;
        metrics::input_partitions(found.partitions);
        Ok(found)
    }

    /// Binds the database to the group and the topic, or checks that it is.
    pub(super) async fn bind(&self, found: &Found) -> Result<(), RunError> {
        let kafka = &self.settings.kafka;
        let wanted = Binding {
            group_id: kafka.group_id.clone(),
            cluster_id: found.cluster_id.clone(),
            topic: kafka.input_topic.clone(),
            topic_id: found.topic_id,
            publishes: kafka.publish,
        };
        let endpoint = &self.settings.postgres.url;
        let pool = endpoint.pool(1).map_err(|error| RunError::Failed(error.to_string()))?;
        let status = Arc::clone(self.status);
        let waits = Waits::new(pool, move |reason| status.probed(Some(Dependency::Down(reason)), None));
        let attempt = async || {
            let transient = |message| AttemptError::Retried(FailureClass::Transient, message);
            let connected = endpoint.connect().await;
            let (mut client, _driver) = connected.map_err(|error| transient(error.to_string()))?;
            let pid = backend_pid(&client).await.map_err(|error| transient(describe(&error)))?;
            let bind = binding::bind(&mut client, &wanted, self.options.adopt_database);
            let (bound, reason) = waits.explain(pid, BINDING, timeout(BINDING_TIMEOUT, bind)).await;
            let message = match bound {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(BindingError::Identity(mismatch))) => {
                    return Err(AttemptError::Final(mismatch.into()));
                }
                Ok(Err(error @ BindingError::Database(_))) => error.to_string(),
                Err(_) => "no answer in time".to_owned(),
            };
            Err(transient(with_reason(message, reason)))
        };
        let probed = |database| self.status.probed(Some(database), None);
        until_it_answers("database", BINDING, probed, attempt).await
    }
}
