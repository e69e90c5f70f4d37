-- The role that writes payments, with the least that it needs: no DDL, no DELETE of payments or ids. Not a step of
-- `migrate`: to be run by the role that owns the schema, after the first `migrate` and after each that ran a step.
-- It may be run again at any time. Making the role itself needs CREATEROLE; where an administrator has made it
-- before, nothing more than the schema's owner is needed.
--
--   psql "$OWNER_URL" -f sql/roles.sql
--   CREATE ROLE alice LOGIN PASSWORD '...' IN ROLE payment_writer_app;      -- and postgres.url names alice
--
-- postgres.housekeeping_url stays with the owner: it makes and drops generations and months.

DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'payment_writer_app') THEN
        CREATE ROLE payment_writer_app NOLOGIN;
    END IF;
EXCEPTION
    -- Somebody else made it meanwhile.
    WHEN duplicate_object OR unique_violation THEN NULL;
END
$$;

GRANT USAGE ON SCHEMA payment_writer TO payment_writer_app;
GRANT SELECT ON ALL TABLES IN SCHEMA payment_writer TO payment_writer_app;
-- Generations made later get the grants that `idempotency` has; those that are there get them here.
DO $$
DECLARE
    leaf name;
BEGIN
    FOR leaf IN
        SELECT c.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
        WHERE i.inhparent = 'payment_writer.idempotency'::regclass
    LOOP
        EXECUTE format('GRANT SELECT, INSERT ON payment_writer.%I TO payment_writer_app', leaf);
    END LOOP;
END
$$;
GRANT INSERT ON
    payment_writer.payment_core, payment_writer.payment_metadata, payment_writer.payment_notes,
    payment_writer.idempotency, payment_writer.source_cursor, payment_writer.bound_group,
    payment_writer.cursor_audit, payment_writer.cursor_settlement,
    payment_writer.dead_letter_replay, payment_writer.dead_letter_replay_chunk, payment_writer.dead_letter_replay_run
    TO payment_writer_app;
GRANT UPDATE ON
    payment_writer.source_cursor, payment_writer.bound_group, payment_writer.cursor_settlement,
    payment_writer.dead_letter_replay_owner, payment_writer.dead_letter_replay_chunk,
    payment_writer.dead_letter_replay_run
    TO payment_writer_app;
GRANT DELETE ON payment_writer.cursor_settlement, payment_writer.dead_letter_replay TO payment_writer_app;
-- PUBLIC has it by default, unless ALTER DEFAULT PRIVILEGES took it away.
GRANT EXECUTE ON FUNCTION
    payment_writer.move_cursors_v1(uuid, integer[], bigint[], bigint[], bigint[], timestamptz[])
    TO payment_writer_app;
