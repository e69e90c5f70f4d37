//! What is asked of the database.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::{Report, Severity};
use crate::config::Settings;
use crate::dependencies::Dependency;
use crate::postgres::connection::{ConnectError, describe, lost_settings};
use crate::postgres::schema::{self, NEWEST_KNOWN, SchemaError, guards, months, shape};

/// The rights that the writer's role needs are those that this file grants.
const ROLES: &str = include_str!("../../sql/roles.sql");
/// The oldest server that docs/how-to/deploy.md names, as `server_version_num`.
const VERSION_MIN: i32 = 150_000;
/// Difference of the clocks that is warned of. Records' times and the database's dates are compared.
const SKEW_MAX: Duration = Duration::from_secs(10);
/// Connections of a process besides two for each lane: the probe, the audit, housekeeping, and two for commands.
const MORE_CONNECTIONS: i64 = 5;

const SERVER: &str = "
    SELECT current_setting('server_version_num')::int, current_setting('server_encoding'),
        current_setting('fsync'), current_setting('full_page_writes'),
        pg_is_in_recovery(), current_setting('default_transaction_read_only'),
        least(nullif(r.rolconnlimit, -1), nullif(d.datconnlimit, -1),
            current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
            - coalesce(current_setting('reserved_connections', true)::int, 0)
            - (SELECT count(*) FROM pg_stat_activity
               WHERE datid IS NOT NULL AND application_name IS DISTINCT FROM current_setting('application_name'))
        )::bigint,
        (extract(epoch FROM clock_timestamp()) * 1000)::bigint
    FROM pg_roles r, pg_database d WHERE r.rolname = current_user AND d.datname = current_database()";

/// What the role may not do. Parameters: relations, `*` for all tables, and a privilege for each.
const MISSING_RIGHTS: &str = "
    WITH ours AS (
        SELECT c.* FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'payment_writer'
    )
    SELECT DISTINCT privilege || ' on ' || c.relname
    FROM unnest($1::text[], $2::text[]) AS needed (relation, privilege)
    JOIN ours c ON c.relname = relation
        OR relation = '*' AND c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relname NOT LIKE 'archived%'
        OR relation = 'idempotency' AND EXISTS (
            SELECT FROM pg_inherits i JOIN ours p ON p.oid = i.inhparent
            WHERE i.inhrelid = c.oid AND p.relname = relation)
    WHERE NOT has_table_privilege(c.oid, privilege)
    UNION ALL
    SELECT 'EXECUTE on ' || proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE n.nspname = 'payment_writer' AND proname = 'move_cursors_v1' AND NOT has_function_privilege(p.oid, 'EXECUTE')
    ORDER BY 1";

const FILTERED: &str = "
    SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'payment_writer' AND c.relkind IN ('r', 'p') AND row_security_active(c.oid) ORDER BY 1";

const NOT_OWNED: &str = "
    SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = 'payment_writer' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
        AND c.relname NOT LIKE 'archived%' AND NOT pg_has_role(c.relowner, 'USAGE') ORDER BY 1";

/// Columns of others that refuse rows. Parameter: the facts of our columns.
const FOREIGN_COLUMNS: &str = "
    SELECT format('%s.%s', c.relname, a.attname)
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    LEFT JOIN pg_inherits i ON i.inhrelid = c.oid LEFT JOIN pg_class p ON p.oid = i.inhparent
    WHERE c.relnamespace = to_regnamespace('payment_writer') AND NOT c.relispartition
        AND coalesce(p.relname, c.relname) = ANY ($2::text[])
        AND a.attnum > 0 AND NOT a.attisdropped AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = ''
        AND NOT EXISTS (SELECT FROM unnest($1::text[]) AS fact
            WHERE starts_with(fact, format('column %s.%s ', coalesce(p.relname, c.relname), a.attname)))
    ORDER BY 1";

/// Triggers, rules and constraints of others. Of ours, the tables that batches write have a key of `idempotency` alone.
const FOREIGN_OBJECTS: &str = "
    WITH ours AS (
        SELECT c.oid AS id, c.relname, coalesce(p.relname, c.relname) AS family
        FROM pg_class c LEFT JOIN pg_inherits i ON i.inhrelid = c.oid LEFT JOIN pg_class p ON p.oid = i.inhparent
        WHERE c.relnamespace = to_regnamespace('payment_writer') AND c.relkind IN ('r', 'p')
    )
    SELECT format('trigger %s on %s', tgname, relname) FROM ours JOIN pg_trigger ON tgrelid = id
    WHERE NOT tgisinternal AND tgparentid = 0 AND tgfoid <> ALL (array_remove(ARRAY[
        to_regprocedure('payment_writer.refuse_removal_v1()')::oid,
        to_regprocedure('payment_writer.guard_generation_v1()')::oid], NULL))
    UNION ALL
    SELECT format('rule %s on %s', rulename, relname) FROM ours JOIN pg_rewrite ON ev_class = id
    UNION ALL
    SELECT format('constraint %s on %s', conname, relname) FROM ours JOIN pg_constraint ON conrelid = id
    WHERE coninhcount = 0 AND conname <> 'idempotency_holds_no_row_itself'
        AND (contype IN ('c', 'f', 'x') AND family IN ('idempotency', 'source_cursor')
            OR contype IN ('c', 'f', 'x', 'p', 'u') AND family IN ('payment_core', 'payment_metadata', 'payment_notes'))
    ORDER BY 1";

/// Returns the session, if one could be opened.
pub(super) async fn examine(settings: &Settings, report: &mut Report) -> Option<Client> {
    let endpoint = &settings.postgres.url;
    let place = endpoint.to_string();
    let client = match endpoint.connect().await {
        Ok((client, _)) => client,
        Err(error @ ConnectError::Pooled { .. }) => {
            report.judge(Dependency::Pooling, &place, false, error);
            return None;
        }
        Err(error) => {
            report.judge(Dependency::DatabaseReachable, &place, false, error);
            return None;
        }
    };
    report.judge(Dependency::DatabaseReachable, &place, true, "the server answers");
    report.judge(Dependency::Pooling, &place, true, "sessions are the server's");
    if let Err(error) = server(settings, &client, &place, report).await {
        report.skip(Dependency::ServerVersion, &place, describe(&error), String::new());
    }
    let lost = lost_settings(&client).await;
    none(report, Dependency::SessionSettings, &place, lost, "differ");
    if schema(&client, &place, report).await {
        let (relations, privileges): (Vec<_>, Vec<_>) = needed().into_iter().unzip();
        let missing = column(&client, MISSING_RIGHTS, &[&relations, &privileges]).await;
        none(report, Dependency::RoleRights, &place, missing, "missing");
        let filtered = column(&client, FILTERED, &[]).await;
        none(report, Dependency::RowSecurity, &place, filtered, "policies apply to");
        match months::unattached(&client).await {
            Ok(tables) if tables.is_empty() => {
                report.judge(Dependency::Months, &place, true, "all are attached")
            }
            Ok(tables) => report.judge(Dependency::Months, &place, false, months::detached(&tables)),
            Err(error) => report.skip(Dependency::Months, &place, error, String::new()),
        }
        let columns: [&(dyn ToSql + Sync); 2] = [&shape::expected(), &schema::REQUIRED_RELATIONS];
        let refusing = column(&client, FOREIGN_COLUMNS, &columns).await;
        none(report, Dependency::ForeignColumns, &place, refusing, "each row needs a value of");
        match guards::missing(&client).await {
            Ok(missing) => none(report, Dependency::GenerationGuard, &place, Ok(missing), "missing"),
            Err(error) => report.skip(Dependency::GenerationGuard, &place, error, String::new()),
        }
        let objects = column(&client, FOREIGN_OBJECTS, &[]).await;
        none(report, Dependency::ForeignObjects, &place, objects, "found");
    }
    let (what, endpoint) = (Dependency::HousekeepingRole, &settings.postgres.housekeeping_url);
    match endpoint.connect().await {
        Ok((owner, _)) => {
            none(report, what, &endpoint.to_string(), column(&owner, NOT_OWNED, &[]).await, "does not own");
        }
        Err(error) => report.judge(what, &endpoint.to_string(), false, error),
    }
    Some(client)
}

async fn column(
    client: &Client,
    query: &str,
    parameters: &[&(dyn ToSql + Sync)],
) -> Result<Vec<String>, tokio_postgres::Error> {
    client.query(query, parameters).await?.iter().map(|row| row.try_get(0)).collect()
}

/// A dependency that is met if a query finds nothing.
fn none(
    report: &mut Report,
    what: Dependency,
    place: &str,
    found: Result<Vec<String>, tokio_postgres::Error>,
    wrong: &str,
) {
    match found {
        Ok(found) if found.is_empty() => report.judge(what, place, true, "as it should be"),
        Ok(found) => report.judge(what, place, false, format!("{wrong}: {}", found.join(", "))),
        Err(error) => report.skip(what, place, describe(&error), String::new()),
    }
}

async fn server(
    settings: &Settings,
    client: &Client,
    place: &str,
    report: &mut Report,
) -> Result<(), tokio_postgres::Error> {
    let asked = SystemTime::now();
    let row = client.query_one(SERVER, &[]).await?;
    let took = asked.elapsed().unwrap_or_default();
    let mut judge = |what, is_fine, found: String| report.judge(what, place, is_fine, found);
    let version: i32 = row.try_get(0)?;
    judge(Dependency::ServerVersion, version >= VERSION_MIN, format!("server_version_num={version}"));
    let encoding: String = row.try_get(1)?;
    judge(Dependency::Encoding, encoding == "UTF8", encoding);
    let (fsync, whole_pages): (String, String) = (row.try_get(2)?, row.try_get(3)?);
    let found = format!("fsync={fsync}, full_page_writes={whole_pages}");
    judge(Dependency::Durability, fsync == "on" && whole_pages == "on", found);
    let (is_standby, read_only): (bool, String) = (row.try_get(4)?, row.try_get(5)?);
    let found = format!("pg_is_in_recovery={is_standby}, default_transaction_read_only={read_only}");
    judge(Dependency::Writable, !is_standby && read_only == "off", found);
    let left: i64 = row.try_get(6)?;
    let needed = settings.lanes as i64 * 2 + MORE_CONNECTIONS;
    let found = format!(
        "{left} connections are left beside those of all instances; one takes up to {needed} with the commands"
    );
    judge(Dependency::Connections, left >= needed, found);
    let theirs: i64 = row.try_get(7)?;
    let ours = (asked + took / 2).duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64;
    let is_near = theirs.abs_diff(ours) <= (SKEW_MAX + took).as_millis() as u64;
    judge(Dependency::Clock, is_near, format!("{} ms ahead of this machine", theirs - ours));
    Ok(())
}

/// Returns whether the tables can be examined further.
async fn schema(client: &Client, place: &str, report: &mut Report) -> bool {
    let missing = match schema::check(client).await {
        Ok(version) => {
            let found = format!("version {version}, the newest is {NEWEST_KNOWN}");
            match version < NEWEST_KNOWN {
                true => {
                    let remedy = Dependency::SchemaVersion.fact().remedy;
                    report.add(Severity::Warn, Dependency::SchemaVersion, place, found, remedy);
                }
                false => report.judge(Dependency::SchemaVersion, place, true, found),
            }
            Vec::new()
        }
        Err(SchemaError::Incomplete(missing)) => {
            report.judge(Dependency::SchemaVersion, place, true, "the steps are applied");
            missing
        }
        Err(error) => {
            let what = match &error {
                SchemaError::TooNew { .. } => Dependency::SchemaNewer,
                SchemaError::Divergent { .. } => Dependency::SchemaSteps,
                _ if error.sqlstate() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Dependency::RoleRights,
                _ => Dependency::SchemaVersion,
            };
            report.judge(what, place, false, error);
            return what == Dependency::RoleRights;
        }
    };
    for what in [Dependency::SchemaNewer, Dependency::SchemaSteps] {
        report.judge(what, place, true, "this program knows its steps");
    }
    let (keys, others): (Vec<_>, Vec<_>) =
        missing.into_iter().partition(|fact| fact.starts_with("unique key idempotency"));
    for key in &keys {
        let table = key.split(' ').nth(2).unwrap_or_default();
        let remedy = Dependency::GenerationKey.fact().remedy.replace("idempotency_g7", table);
        report.add(Severity::Error, Dependency::GenerationKey, place, format!("missing: {key}"), remedy);
    }
    if keys.is_empty() {
        report.judge(Dependency::GenerationKey, place, true, "each generation has its key");
    }
    none(report, Dependency::SchemaShape, place, Ok(others), "missing");
    true
}

/// The relations and privileges that sql/roles.sql grants; its functions and generations are in the query.
fn needed() -> Vec<(String, String)> {
    let lines = ROLES.lines().filter(|line| !line.starts_with("--"));
    let text: String = lines.flat_map(|line| [line, "\n"]).collect();
    let grants = text.split(';').filter_map(|statement| {
        let (privilege, rest) = statement.trim().strip_prefix("GRANT ")?.split_once(" ON")?;
        Some((
            privilege.to_owned(),
            rest.split_once(" TO ").or(rest.split_once("\n    TO "))?.0.trim().to_owned(),
        ))
    });
    let mut needed = Vec::new();
    for (privilege, relations) in grants {
        if relations.starts_with("ALL TABLES") {
            needed.push(("*".to_owned(), privilege));
        } else if !relations.starts_with("FUNCTION") && !relations.starts_with("SCHEMA") {
            let names = relations.split(',').filter_map(|name| name.trim().strip_prefix("payment_writer."));
            needed.extend(names.map(|name| (name.to_owned(), privilege.clone())));
        }
    }
    needed
}

#[cfg(test)]
mod tests {
    use super::needed;

    #[test]
    fn the_grants_of_the_roles_file_are_found() {
        let needed = needed();
        let has =
            |relation: &str, privilege: &str| needed.contains(&(relation.to_owned(), privilege.to_owned()));
        assert!(
            has("*", "SELECT") && has("payment_core", "INSERT") && has("idempotency", "INSERT"),
            "{needed:?}"
        );
        assert!(has("source_cursor", "UPDATE") && has("dead_letter_replay", "DELETE"), "{needed:?}");
        assert_eq!(needed.len(), 1 + 11 + 6 + 2, "{needed:?}");
    }
}
