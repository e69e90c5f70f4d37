-- Message ids that are removed by hand make later duplicates be written a second time, without any error. So DELETE and
-- TRUNCATE of the generations are refused; housekeeping drops whole tables. Triggers of statements cost INSERT and COPY
-- nothing, and do not fire where session_replication_role is replica, as when logical replication applies changes.

CREATE FUNCTION payment_writer.refuse_removal_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog
AS $$
BEGIN
    RAISE EXCEPTION '% of message ids is refused on payment_writer.%: payments with these ids could be written twice',
        TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'object_not_in_prerequisite_state',
              HINT = '"payment-writer prune" drops ids that are no longer needed. To remove ids nevertheless: '
                  'SET LOCAL session_replication_role = replica as superuser, or ALTER TABLE ... DISABLE TRIGGER '
                  'message_ids_stay as owner.';
END
$$;

-- On each new generation, whoever makes it: make_generation_v1 adds its row after its table.
CREATE FUNCTION payment_writer.guard_generation_v1() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog
AS $$
BEGIN
    IF to_regclass(format('payment_writer.%I', NEW.leaf)) IS NOT NULL THEN
        EXECUTE format(
            'CREATE OR REPLACE TRIGGER message_ids_stay BEFORE DELETE OR TRUNCATE ON payment_writer.%I
             EXECUTE FUNCTION payment_writer.refuse_removal_v1()',
            NEW.leaf);
    END IF;
    RETURN NULL;
END
$$;

CREATE TRIGGER guard_generation AFTER INSERT ON payment_writer.idempotency_generation
    FOR EACH ROW EXECUTE FUNCTION payment_writer.guard_generation_v1();

-- Triggers of statements fire for the named table alone, which may be the parent.
DO $$
DECLARE
    guarded regclass;
BEGIN
    FOR guarded IN
        SELECT 'payment_writer.idempotency'::regclass
        UNION ALL
        SELECT inhrelid::regclass FROM pg_inherits WHERE inhparent = 'payment_writer.idempotency'::regclass
    LOOP
        EXECUTE format(
            'CREATE TRIGGER message_ids_stay BEFORE DELETE OR TRUNCATE ON %s
             EXECUTE FUNCTION payment_writer.refuse_removal_v1()',
            guarded);
    END LOOP;
END
$$;
