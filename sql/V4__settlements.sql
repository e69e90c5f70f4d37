-- What a person decided about a halted partition and no lane has taken up yet: the group's offset is to be
-- `committed`, whatever it is now. Written by `cursors accept` and `cursors skip`, together with the cursor
-- itself; removed by the lane that took it up.
CREATE TABLE payment_writer.cursor_settlement (
    topic_id   uuid        NOT NULL,
    partition  integer     NOT NULL,
    committed  bigint      NOT NULL,
    settled_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic_id, partition)
);
