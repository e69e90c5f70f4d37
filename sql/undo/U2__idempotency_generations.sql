-- Forgets every message id that was ever claimed.
DO $$
DECLARE
    leaf_name text;
BEGIN
    FOR leaf_name IN
        SELECT g.leaf FROM payment_writer.idempotency_generation g WHERE g.state <> 'dropped' ORDER BY g.generation
    LOOP
        EXECUTE format('DROP TABLE IF EXISTS payment_writer.%I', leaf_name);
    END LOOP;
END
$$;
DROP FUNCTION payment_writer.make_generation_v1(bigint);
DROP TABLE payment_writer.idempotency_current;
DROP TABLE payment_writer.idempotency_generation;
DROP TABLE payment_writer.idempotency;
