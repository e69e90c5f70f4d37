-- The message ids that were claimed, and by which record: what makes "once" true.
--
-- Plain inheritance instead of partitioning: a message id must be unique over a generation whatever its
-- date, which a partitioned table's unique constraint cannot say, and a generation must be left by a flip of
-- one row, not by DDL on a table that every writer uses. `idempotency` is the name to read; it holds no row
-- itself. Writers insert into the current generation's table by its own name, and look into the older ones.

CREATE TABLE payment_writer.idempotency (
    message_id       uuid        NOT NULL,
    source_offset    bigint      NOT NULL,
    payload_hash     bigint      NOT NULL,
    created_at       timestamptz NOT NULL,
    source_partition integer     NOT NULL,
    date             date        NOT NULL DEFAULT (now() AT TIME ZONE 'UTC')::date,
    CONSTRAINT idempotency_holds_no_row_itself CHECK (false) NO INHERIT
);

COMMENT ON TABLE payment_writer.idempotency IS
    'Claimed message ids of all live generations. created_at is the timestamp of the record that claimed.';
COMMENT ON COLUMN payment_writer.idempotency.date IS
    'UTC date of the claim, by the database''s clock.';

-- The life of a generation: ready (its table was made ahead of time), current (claims go there), older
-- (looked into, not written), retired (nobody looks any more, its table still hangs below `idempotency`),
-- detached (a table on its own), dropped (only this row is left).
CREATE TABLE payment_writer.idempotency_generation (
    generation      bigint      PRIMARY KEY CHECK (generation > 0),
    leaf            text        NOT NULL UNIQUE,
    state           text        NOT NULL
        CHECK (state IN ('ready', 'current', 'older', 'retired', 'detached', 'dropped')),
    created_at      timestamptz NOT NULL DEFAULT now(),
    made_current_at timestamptz,
    made_older_at   timestamptz,
    retired_at      timestamptz,
    detached_at     timestamptz,
    dropped_at      timestamptz,
    youngest_record timestamptz
);

CREATE UNIQUE INDEX idempotency_generation_one_is_current
    ON payment_writer.idempotency_generation (state) WHERE state = 'current';

COMMENT ON COLUMN payment_writer.idempotency_generation.youngest_record IS
    'Largest created_at in a generation that is no longer written; null while it is not known.';

-- One row that every batch reads: where to claim and where else to look.
CREATE TABLE payment_writer.idempotency_current (
    only_row           boolean       PRIMARY KEY DEFAULT true CHECK (only_row),
    current_generation bigint        NOT NULL,
    older_generations  bigint[]      NOT NULL DEFAULT '{}',
    older_youngest     timestamptz[] NOT NULL DEFAULT '{}',
    changed_at         timestamptz   NOT NULL DEFAULT now(),
    CONSTRAINT older_arrays_are_parallel CHECK (cardinality(older_generations) = cardinality(older_youngest)),
    CONSTRAINT current_is_not_older CHECK (current_generation <> ALL (older_generations))
);

COMMENT ON COLUMN payment_writer.idempotency_current.older_youngest IS
    'Per older generation its youngest_record; a null means that it must always be looked into.';

-- Makes the table of a generation: one definition of its shape, for the first and for all that follow.
-- Returns the table's name without its schema. Needs the role that owns `idempotency`; whoever was granted
-- something on `idempotency` gets the same on the new table, because writers insert there by name.
CREATE FUNCTION payment_writer.make_generation_v1(p_generation bigint) RETURNS text
    LANGUAGE plpgsql
    SET search_path = pg_catalog
AS $$
DECLARE
    leaf_name CONSTANT text := 'idempotency_g' || p_generation;
    privilege record;
BEGIN
    -- Rows are only ever added: pages are filled to the brim, and vacuumed in bites of a fixed size while
    -- they are still in memory, instead of a fifth of an ever growing table at a time.
    EXECUTE format(
        'CREATE TABLE payment_writer.%I (PRIMARY KEY (message_id)) INHERITS (payment_writer.idempotency)
         WITH (fillfactor = 100,
               autovacuum_vacuum_insert_scale_factor = 0,
               autovacuum_vacuum_insert_threshold = 5000000)',
        leaf_name);
    FOR privilege IN
        SELECT a.privilege_type,
               CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END AS grantee
        FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = 'payment_writer.idempotency'::regclass AND a.grantee <> c.relowner
    LOOP
        EXECUTE format('GRANT %s ON payment_writer.%I TO %s', privilege.privilege_type, leaf_name, privilege.grantee);
    END LOOP;
    INSERT INTO payment_writer.idempotency_generation (generation, leaf, state)
    VALUES (p_generation, leaf_name, 'ready');
    RETURN leaf_name;
END
$$;

SELECT payment_writer.make_generation_v1(1);
UPDATE payment_writer.idempotency_generation SET state = 'current', made_current_at = now() WHERE generation = 1;
INSERT INTO payment_writer.idempotency_current (current_generation) VALUES (1);
