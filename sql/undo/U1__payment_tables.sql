-- Drops every payment. Partitions go with their tables; months that were detached for archiving do not,
-- and keep the schema from being dropped until somebody has moved them away.
DROP TABLE payment_writer.schema_compatibility;
DROP TABLE payment_writer.payment_notes;
DROP TABLE payment_writer.payment_metadata;
DROP TABLE payment_writer.payment_core;
