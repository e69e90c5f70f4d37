-- With their triggers.
DROP FUNCTION payment_writer.guard_generation_v1() CASCADE;
DROP FUNCTION payment_writer.refuse_removal_v1() CASCADE;
