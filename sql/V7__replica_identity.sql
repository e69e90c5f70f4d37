-- A publication of updates and deletes, such as FOR ALL TABLES, makes Postgres refuse every DELETE from a table
-- without a replica identity (55000). Of all tables from which rows are deleted, only the default partitions of the
-- payment tables have no primary key: their rows are moved to their months. A subscriber that uses
-- publish_via_partition_root takes the identity from the partitioned tables. The months need none: nothing is
-- deleted from them.
ALTER TABLE payment_writer.payment_core             REPLICA IDENTITY FULL;
ALTER TABLE payment_writer.payment_core_default     REPLICA IDENTITY FULL;
ALTER TABLE payment_writer.payment_metadata         REPLICA IDENTITY FULL;
ALTER TABLE payment_writer.payment_metadata_default REPLICA IDENTITY FULL;
ALTER TABLE payment_writer.payment_notes            REPLICA IDENTITY FULL;
ALTER TABLE payment_writer.payment_notes_default    REPLICA IDENTITY FULL;
