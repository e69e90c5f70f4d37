-- The group's offset that an operator's decision replaces (-1: there was none). A restored database may hold a decision
-- that a lane took up after the backup: the group has moved on, and the decision no longer holds.
ALTER TABLE payment_writer.cursor_settlement ADD COLUMN replaces bigint;
