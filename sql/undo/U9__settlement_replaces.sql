ALTER TABLE payment_writer.cursor_settlement DROP COLUMN replaces;
