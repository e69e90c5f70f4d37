-- Which dead letters were replayed, by whom and why: a letter is claimed here before it is sent, so that it goes
-- once, whoever asks, and whatever is killed in between.

-- One row a run of `dlq replay --apply`: the audit.
CREATE TABLE payment_writer.dead_letter_replay_run (
    run_id      uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    started_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz,
    who         text        NOT NULL DEFAULT session_user,
    topic       text        NOT NULL,
    topic_id    uuid        NOT NULL,
    choice      text        NOT NULL,
    is_forced   boolean     NOT NULL,
    note        text        NOT NULL,
    outcome     jsonb
);
COMMENT ON COLUMN payment_writer.dead_letter_replay_run.topic IS 'The dead-letter topic.';
COMMENT ON COLUMN payment_writer.dead_letter_replay_run.finished_at IS 'Null for a run that was killed or failed.';

-- The run that may write to the tables below: the last one that began. All others have lost that right.
CREATE TABLE payment_writer.dead_letter_replay_owner (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    run_id   uuid
);
INSERT INTO payment_writer.dead_letter_replay_owner DEFAULT VALUES;

-- What is sent in one Kafka transaction. That transaction leaves the chunk's id in a consumer group of its own;
-- `previous` is the id that stood there before. So the group tells whether a chunk that is only claimed was sent.
CREATE TABLE payment_writer.dead_letter_replay_chunk (
    chunk_id   uuid        PRIMARY KEY DEFAULT gen_random_uuid(),
    run_id     uuid        NOT NULL,
    previous   uuid        NOT NULL,
    letters    integer     NOT NULL,
    state      text        NOT NULL DEFAULT 'claimed' CHECK (state IN ('claimed', 'sent', 'released')),
    claimed_at timestamptz NOT NULL DEFAULT now(),
    settled_at timestamptz,
    settled_by uuid
);
CREATE INDEX dead_letter_replay_chunk_claimed ON payment_writer.dead_letter_replay_chunk (claimed_at)
    WHERE state = 'claimed';
COMMENT ON COLUMN payment_writer.dead_letter_replay_chunk.settled_by IS
    'The run that found out what became of it.';

-- The letters that were replayed, or are about to be.
CREATE TABLE payment_writer.dead_letter_replay (
    topic_id      uuid    NOT NULL,
    partition     integer NOT NULL,
    letter_offset bigint  NOT NULL,
    chunk_id      uuid    NOT NULL,
    PRIMARY KEY (topic_id, partition, letter_offset)
);
CREATE INDEX dead_letter_replay_of_chunk ON payment_writer.dead_letter_replay (chunk_id);
