-- Forgets how far the input topic was written, and which database this is: a group that wrote here will
-- refuse to go on without being told to.
DROP FUNCTION payment_writer.move_cursors_v1(uuid, integer[], bigint[], bigint[], bigint[], timestamptz[]);
DROP TABLE payment_writer.cursor_audit;
DROP TABLE payment_writer.bound_group;
DROP TABLE payment_writer.database_identity;
DROP TABLE payment_writer.source_cursor;
