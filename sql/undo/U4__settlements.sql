DROP TABLE payment_writer.cursor_settlement;
