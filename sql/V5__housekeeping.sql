-- What housekeeping needs: bounds of the ids in generations that are no longer written, so that most ids need
-- no look into them, and a record of every pass.

-- The largest first 48 bits of an id, over the ids whose bits are a UUIDv7's and over all others. For a UUIDv7
-- and for a ULID these bits are milliseconds since 1970. They are taken from the rows themselves: an id above
-- the bound of its kind is not in the table, whatever rule it was accepted by. Null: not measured yet, must
-- be looked into.
ALTER TABLE payment_writer.idempotency_generation
    ADD COLUMN v7_time_max    bigint,
    ADD COLUMN other_time_max bigint,
    ADD COLUMN row_count      bigint;

COMMENT ON COLUMN payment_writer.idempotency_generation.row_count IS
    'Rows of a generation that is no longer written; null while not counted.';

ALTER TABLE payment_writer.idempotency_current
    ADD COLUMN older_v7_time_max    bigint[] NOT NULL DEFAULT '{}',
    ADD COLUMN older_other_time_max bigint[] NOT NULL DEFAULT '{}';
UPDATE payment_writer.idempotency_current
SET older_v7_time_max = array_fill(NULL::bigint, ARRAY[cardinality(older_generations)]),
    older_other_time_max = array_fill(NULL::bigint, ARRAY[cardinality(older_generations)])
WHERE cardinality(older_generations) > 0;
ALTER TABLE payment_writer.idempotency_current
    ADD CONSTRAINT older_bounds_are_parallel CHECK (
        cardinality(older_generations) = cardinality(older_v7_time_max)
        AND cardinality(older_generations) = cardinality(older_other_time_max)
    );

-- One row a pass that came to its end, whoever started it. Whether a scheduled pass was missed is told by it.
CREATE TABLE payment_writer.housekeeping_pass (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    started_at  timestamptz NOT NULL,
    finished_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    who         text        NOT NULL DEFAULT session_user,
    -- Nothing is left that a later try within this schedule could do.
    is_complete boolean     NOT NULL,
    detail      jsonb       NOT NULL
);
