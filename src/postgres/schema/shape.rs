//! What the program depends on in the schema beyond the names of its tables: column types with their precision, NOT
//! NULL, valid unique keys, default partitions, and that no table is unlogged, which a crash of the server empties. A restore whose last step failed, or a manual change, can lose them without any
//! error: without its key, a generation of `idempotency` accepts every payment twice.

use tokio_postgres::Client;

use super::REQUIRED_RELATIONS;

/// The facts of the required tables, one per line. A test holds them equal to a database that was just migrated.
const EXPECTED: &str = include_str!("shape.txt");

/// The facts that are expected and not found. The generations that batches use, or will use next, have the columns of
/// `idempotency` and a key of their own. Parameters: the expected facts, the tables.
const MISSING: &str = "
    WITH leaf AS (
        SELECT leaf AS name FROM payment_writer.idempotency_generation
        WHERE state IN ('ready', 'current', 'older')
    ), ours AS (
        SELECT oid, relname FROM pg_catalog.pg_class
        WHERE relnamespace = to_regnamespace('payment_writer')
            AND (relname = ANY ($2::text[]) OR relname IN (SELECT name FROM leaf))
    ), stored AS (
        SELECT relname, relpersistence FROM pg_catalog.pg_class
        WHERE relnamespace = to_regnamespace('payment_writer') AND relkind = 'r'
    ), attribute AS (
        SELECT o.relname, a.* FROM ours o JOIN pg_catalog.pg_attribute a ON a.attrelid = o.oid
        WHERE a.attnum > 0 AND NOT a.attisdropped
    ), found (fact) AS (
        SELECT format('column %s.%s %s', relname, attname, format_type(atttypid, atttypmod)) FROM attribute
        UNION ALL
        SELECT format('not null %s.%s', relname, attname) FROM attribute WHERE attnotnull
        UNION ALL
        SELECT format('unique key %s (%s)', o.relname, (
            SELECT string_agg(a.attname, ', ' ORDER BY k.place)
            FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (number, place)
            JOIN pg_catalog.pg_attribute a ON a.attrelid = o.oid AND a.attnum = k.number))
        FROM ours o JOIN pg_catalog.pg_index i ON i.indrelid = o.oid
        WHERE i.indisunique AND i.indisvalid AND i.indisready AND i.indimmediate
            AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indnatts = i.indnkeyatts
        UNION ALL
        SELECT format('default partition of %s', o.relname)
        FROM ours o JOIN pg_catalog.pg_partitioned_table p ON p.partrelid = o.oid WHERE p.partdefid <> 0
        UNION ALL
        SELECT format('logged table %s', relname) FROM stored WHERE relpersistence = 'p'
    ), expected (fact) AS (
        SELECT format('logged table %s', relname) FROM stored
        UNION ALL
        SELECT * FROM unnest($1::text[])
        UNION ALL
        SELECT replace(fact, ' idempotency.', ' ' || name || '.')
        FROM unnest($1::text[]) AS fact, leaf WHERE fact LIKE '% idempotency.%'
        UNION ALL
        SELECT format('unique key %s (message_id)', name) FROM leaf
    )
    SELECT fact FROM expected EXCEPT SELECT fact FROM found ORDER BY fact";

/// The facts of the required tables.
pub fn expected() -> Vec<&'static str> {
    EXPECTED.lines().collect()
}

/// Returns the facts that are missing, sorted.
///
/// # Errors
/// The driver's error.
pub async fn missing(client: &Client) -> Result<Vec<String>, tokio_postgres::Error> {
    let rows = client.query(MISSING, &[&expected(), &REQUIRED_RELATIONS]).await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}
