ALTER TABLE payment_writer.payment_core             REPLICA IDENTITY DEFAULT;
ALTER TABLE payment_writer.payment_core_default     REPLICA IDENTITY DEFAULT;
ALTER TABLE payment_writer.payment_metadata         REPLICA IDENTITY DEFAULT;
ALTER TABLE payment_writer.payment_metadata_default REPLICA IDENTITY DEFAULT;
ALTER TABLE payment_writer.payment_notes            REPLICA IDENTITY DEFAULT;
ALTER TABLE payment_writer.payment_notes_default    REPLICA IDENTITY DEFAULT;
