//! Identity columns whose sequence is behind the rows. Logical replication copies rows and no sequences, so a
//! subscriber that becomes the database would number new rows from 1 again.

use tokio_postgres::Client;

use super::{SchemaError, doing};

/// Sets each sequence that is behind to the largest number in its table. A role that may not set it changes nothing.
const CATCH_UP: &str = "
    DO $$
    DECLARE
        identity record;
    BEGIN
        FOR identity IN
            SELECT t.oid::regclass AS relation, a.attname AS name,
                pg_catalog.pg_get_serial_sequence(t.oid::regclass::text, a.attname) AS sequence
            FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class t ON t.oid = a.attrelid
            WHERE t.relnamespace = to_regnamespace('payment_writer') AND a.attidentity <> ''
        LOOP
            CONTINUE WHEN NOT has_sequence_privilege(identity.sequence, 'UPDATE')
                OR NOT has_sequence_privilege(identity.sequence, 'SELECT');
            EXECUTE format(
                'SELECT setval(%1$L, max(%2$I)) FROM %3$s
                 HAVING max(%2$I) >= (SELECT last_value + is_called::int FROM %1$s)',
                identity.sequence, identity.name, identity.relation);
        END LOOP;
    END
    $$";

/// Lets identity columns go on after their largest number.
///
/// # Errors
/// If the database fails.
pub async fn catch_up(client: &Client) -> Result<(), SchemaError> {
    client.batch_execute(CATCH_UP).await.map_err(doing("cannot set the sequences of identity columns"))
}
