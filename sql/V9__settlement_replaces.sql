-- What the group had committed when an operator decided, its offset and metadata (empty: nothing). A restored database may
-- hold a decision that a lane took up after the backup: the group has moved on, and the decision no longer holds.
ALTER TABLE payment_writer.cursor_settlement ADD COLUMN replaces text;
