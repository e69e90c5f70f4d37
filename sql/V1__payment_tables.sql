-- Payments, one row each in core and metadata, one in notes when there is something to note.
--
-- No primary keys, no indexes, no foreign keys: a payment is written once, by the transaction that claims
-- its message id, so `idempotency` is what keeps it single. Indexes here would be most of the cost of a write.
-- Partitioned by month, so that old months can be detached as wholes. Months are made ahead of time by the
-- daemon; the default partitions are the net for records whose month nobody foresaw.
--
-- The schema itself is made by `migrate` before the first step, because the history of steps lives in it.

CREATE TABLE payment_writer.payment_core (
    payment_id uuid           NOT NULL,
    created_at timestamptz    NOT NULL,
    cust_id    bigint         NOT NULL,
    amount     numeric(20, 6) NOT NULL,
    currency   text           NOT NULL,
    status     smallint       NOT NULL,
    type       text           NOT NULL
) PARTITION BY RANGE (created_at);

CREATE TABLE payment_writer.payment_metadata (
    payment_id       uuid        NOT NULL,
    created_at       timestamptz NOT NULL,
    updated_at       timestamptz NOT NULL,
    version          integer     NOT NULL,
    message_id       uuid        NOT NULL,
    source_partition integer     NOT NULL,
    source_offset    bigint      NOT NULL
) PARTITION BY RANGE (created_at);

CREATE TABLE payment_writer.payment_notes (
    payment_id      uuid        NOT NULL,
    created_at      timestamptz NOT NULL,
    external_ref_id text,
    comment         text
) PARTITION BY RANGE (created_at);

CREATE TABLE payment_writer.payment_core_default
    PARTITION OF payment_writer.payment_core DEFAULT;
CREATE TABLE payment_writer.payment_metadata_default
    PARTITION OF payment_writer.payment_metadata DEFAULT;
CREATE TABLE payment_writer.payment_notes_default
    PARTITION OF payment_writer.payment_notes DEFAULT;

COMMENT ON TABLE payment_writer.payment_core IS
    'Payments. created_at is the timestamp of the input record; amount is exact.';
COMMENT ON TABLE payment_writer.payment_metadata IS
    'Where each payment came from: message id, partition and offset of the input topic.';
COMMENT ON TABLE payment_writer.payment_notes IS
    'Free text of a payment; a row only when there is a comment or an external reference.';

-- During a rolling upgrade the previous version's daemon meets a schema newer than any it knows. It may go
-- on if the newest step it knows is at least `oldest_known_version`. A step that would break older daemons
-- raises the value to its own version, and its undo file sets it back.
CREATE TABLE payment_writer.schema_compatibility (
    only_row             boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    oldest_known_version integer NOT NULL
);
INSERT INTO payment_writer.schema_compatibility (oldest_known_version) VALUES (1);
