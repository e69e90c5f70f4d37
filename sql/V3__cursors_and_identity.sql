-- How far each partition of the input topic was written and published, which database this is, and which
-- consumer group it belongs to.

-- Every row is updated by every batch that touches its partition, no indexed column ever changes: half empty
-- pages keep the updates on their page (HOT), where they are cleaned up in passing.
CREATE TABLE payment_writer.source_cursor (
    topic             text    NOT NULL,
    topic_id          uuid    NOT NULL,
    partition         integer NOT NULL,
    applied           bigint  NOT NULL,
    published         bigint,
    applied_timestamp timestamptz,
    PRIMARY KEY (topic_id, partition)
) WITH (fillfactor = 50);

-- `published` may exceed `applied`: after a restore it is a copy of a group offset that the rows have yet to
-- reach again. No constraint says otherwise.
COMMENT ON COLUMN payment_writer.source_cursor.applied IS 'Offset of the next record to write.';
COMMENT ON COLUMN payment_writer.source_cursor.published IS
    'Copy of the group''s committed offset, a batch behind; null in a database that never publishes.';
COMMENT ON COLUMN payment_writer.source_cursor.applied_timestamp IS
    'Timestamp of the last record before applied; null if it has none.';

-- Which database this is. The id survives backup, restore and failover, and is part of the mark on every
-- group offset: offsets that another database's daemon committed are told by it.
CREATE TABLE payment_writer.database_identity (
    only_row    boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    database_id uuid        NOT NULL DEFAULT gen_random_uuid(),
    created_at  timestamptz NOT NULL DEFAULT now()
);
INSERT INTO payment_writer.database_identity DEFAULT VALUES;

-- The one group that writes to this database; no row until the first daemon came.
CREATE TABLE payment_writer.bound_group (
    only_row   boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    group_id   text        NOT NULL,
    cluster_id text        NOT NULL,
    topic      text        NOT NULL,
    topic_id   uuid        NOT NULL,
    publishes  boolean     NOT NULL,
    bound_at   timestamptz NOT NULL DEFAULT now()
);

-- Everything that a person, not a batch, did to a cursor or to the binding.
CREATE TABLE payment_writer.cursor_audit (
    id        bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at        timestamptz NOT NULL DEFAULT now(),
    who       text        NOT NULL DEFAULT session_user,
    command   text        NOT NULL,
    topic     text,
    topic_id  uuid,
    partition integer,
    before    jsonb,
    after     jsonb,
    reason    text
);

-- Moves the cursors of one batch, or fails and lets nothing of the batch commit.
--
-- The arrays are parallel, one element a partition, no partition twice:
--   p_seen        `applied` as the lane last read or wrote it: the guard against zombies
--   p_applied     next offset to write after this batch
--   p_published   the group's committed offset, null to leave the column alone
--   p_timestamps  timestamp of the last record before p_applied; null: keep what is there (no record was
--                 passed); '-infinity': that record has none
-- Cursors only ever move forward.
--
-- Raises PW001 when `applied` of a partition is not what was seen, or its row is missing. DETAIL is JSON:
-- {"partition": 7, "seen": 100, "applied": 120}, for the lowest such partition; applied is null for a missing
-- row. Raises PW002 when the arrays are not parallel or name a partition twice: an error of the caller.
--
-- The version is part of the name, so that the daemons of two versions can run beside each other.
CREATE FUNCTION payment_writer.move_cursors_v1(
    p_topic_id   uuid,
    p_partitions integer[],
    p_seen       bigint[],
    p_applied    bigint[],
    p_published  bigint[],
    p_timestamps timestamptz[]
) RETURNS void
    LANGUAGE plpgsql
    VOLATILE
    -- One plan for good, and one that cannot turn quadratic: hash joins, whatever the statistics of a table
    -- say that is a few pages long and changes all the time.
    SET plan_cache_mode = force_generic_plan
    SET enable_nestloop = off
AS $$
DECLARE
    wanted CONSTANT integer := cardinality(p_partitions);
    guarded         integer;
    moved           integer;
    lost            record;
BEGIN
    IF wanted IS DISTINCT FROM cardinality(p_seen)
        OR wanted IS DISTINCT FROM cardinality(p_applied)
        OR wanted IS DISTINCT FROM cardinality(p_published)
        OR wanted IS DISTINCT FROM cardinality(p_timestamps)
    THEN
        RAISE EXCEPTION USING ERRCODE = 'PW002', MESSAGE = 'move_cursors: the arrays differ in length';
    END IF;

    -- Locked in partition order, so that two lanes that both believe to own partitions cannot deadlock. A row
    -- that had to be waited for comes back as it is after the wait. FILTER, because a WHERE would be pushed
    -- below the locks, and what failed it would not be locked while we report it.
    SELECT count(*) FILTER (WHERE locked.applied = locked.seen) INTO guarded
    FROM (
        SELECT c.applied, m.seen
        FROM unnest(p_partitions, p_seen) AS m (partition, seen)
        JOIN payment_writer.source_cursor c ON c.topic_id = p_topic_id AND c.partition = m.partition
        ORDER BY c.partition
        FOR NO KEY UPDATE OF c
    ) AS locked;
    IF guarded <> wanted THEN
        SELECT m.partition, m.seen, c.applied INTO lost
        FROM unnest(p_partitions, p_seen) AS m (partition, seen)
        LEFT JOIN payment_writer.source_cursor c ON c.topic_id = p_topic_id AND c.partition = m.partition
        WHERE c.applied = m.seen IS NOT TRUE
        ORDER BY m.partition
        LIMIT 1;
        RAISE EXCEPTION USING ERRCODE = 'PW001',
            MESSAGE = format('cursor of partition %s: applied is %s, expected %s',
                lost.partition, coalesce(lost.applied::text, 'absent'), coalesce(lost.seen::text, 'null')),
            DETAIL = json_build_object('partition', lost.partition, 'seen', lost.seen, 'applied', lost.applied);
    END IF;

    -- A statement of its own: its snapshot sees what was committed while the locks were waited for.
    UPDATE payment_writer.source_cursor c
    SET applied = greatest(c.applied, m.applied),
        published = greatest(c.published, m.published),
        applied_timestamp = CASE
            WHEN m.applied > c.applied
                THEN nullif(coalesce(m.applied_timestamp, c.applied_timestamp), '-infinity')
            ELSE c.applied_timestamp
        END
    FROM unnest(p_partitions, p_seen, p_applied, p_published, p_timestamps)
        AS m (partition, seen, applied, published, applied_timestamp)
    WHERE c.topic_id = p_topic_id AND c.partition = m.partition AND c.applied = m.seen;
    GET DIAGNOSTICS moved = ROW_COUNT;
    IF moved = wanted THEN
        RETURN;
    END IF;
    RAISE EXCEPTION USING ERRCODE = 'PW002', MESSAGE = 'move_cursors: a partition is named twice';
END
$$;
