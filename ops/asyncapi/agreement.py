"""Compares docs/schemas with what the daemon does with records, and with what it publishes. See `check`."""

import hashlib
import json
import re
import sys
import time
import uuid
from collections import Counter, defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from confluent_kafka import Consumer, Producer, TopicPartition
from jsonschema import Draft202012Validator, validators

import edges

# What `check` has the programs of docs/how-to/produce.md send.
CLIENTS, PAYMENTS = 4, 500
REPOSITORY = Path(__file__).resolve().parents[2]
SCHEMAS = REPOSITORY / "docs/schemas"
INPUT, READ, EMAIL, DEAD = "payment_writer_topic", "payment_read_topic", "payment_email", "payment_writer_topic.dlq"

# Records that the schemas accept and the daemon refuses: what the description of the schema says in words. Reason, and
# what the daemon's detail contains.
BEYOND_SCHEMAS = [
    ("too_large", "value: larger than payment.max_bytes"),
    ("unsupported_schema_version", "header schema-version: is not 1"),  # one of several
    ("malformed_json", "has a name twice in one object"),
    ("malformed_json", "has a lone surrogate"),
    ("malformed_json", "nests deeper than 32 levels"),
    ("invalid_field", "amount: has a digit beyond the currency's minor unit"),
    ("invalid_field", "amount: has more than 14 integer digits"),
    ("invalid_field", "custId: is not written as a plain integer"),
    ("invalid_field", "status: is not written as a plain integer"),
    ("invalid_field", "type: is not in payment.types"),
    ("key_mismatch", "key: is not the decimal text of custId"),
    ("invalid_timestamp", "timestamp: outside the years 2000 to 2099"),
    ("stale_message_id", "messageId: its time lies more than idempotency.window before"),
    ("stale_message_id", "messageId: its time lies more than an hour after"),
    ("message_id_conflict", "messageId: seen on another record with another payload"),
]


def fail(text):
    sys.exit(f"ops/asyncapi/check: {text}")


def is_integer(_, value):
    """JSON Schema's integers: 2.0 is one."""
    if isinstance(value, Decimal):
        return value.is_finite() and value == value.to_integral_value()
    return isinstance(value, int) and not isinstance(value, bool)


EXACT = validators.extend(Draft202012Validator,
                          type_checker=Draft202012Validator.TYPE_CHECKER.redefine("integer", is_integer))


def schema(name):
    loaded = json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))
    EXACT.check_schema(loaded)
    validator = EXACT(loaded)
    for example in loaded["examples"]:
        validator.validate(example)
    return validator


def parse(value):
    """A JSON text with exact numbers, or None."""
    def refuse(word):
        raise ValueError(word)
    try:
        return json.loads(value.decode("utf-8"), parse_float=Decimal, parse_constant=refuse)
    except ValueError:
        return None


def headers_of(record):
    """Headers as an object of texts; of repeated ones the last."""
    return {name: None if value is None else value.decode("utf-8", "replace")
            for name, value in record.headers() or []}


def fields_of(errors):
    """Fields that a validator's errors are about."""
    fields = set()
    for error in errors:
        if error.path:
            fields.add(str(error.path[0]))
        elif error.validator == "required":
            fields |= set(re.findall(r"'(\w+)' is a required", error.message))
    return fields


def read(bootstrap_servers, topic):
    """Committed records of a topic by partition and offset."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "check", "enable.auto.commit": False,
                         "isolation.level": "read_committed", "enable.partition.eof": True})
    partitions = consumer.list_topics(topic, timeout=60).topics[topic].partitions
    consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
    records, at_end, limit = {}, set(), time.monotonic() + 300
    while len(at_end) < len(partitions):
        time.monotonic() < limit or fail(f"{topic}: not read to its end in five minutes")
        # It waits for so many of them, or as long.
        for record in consumer.consume(1000, timeout=0.2):
            if record.error():
                at_end.add(record.partition())
            else:
                records[record.partition(), record.offset()] = record
    consumer.close()
    return records


def place(record):
    return f"{record.topic()} {record.partition()}/{record.offset()}"


def beyond_schemas(verdict):
    """The rule of BEYOND_SCHEMAS that a dead letter is about."""
    return next((rule for rule in BEYOND_SCHEMAS if verdict["reason"] == rule[0] and rule[1] in verdict["detail"]), None)


def compare_input(records, verdicts):
    """Each record: the schemas' verdict against the daemon's, in both directions."""
    payment, payment_headers = schema("payment"), schema("payment-headers")
    beyond, both = Counter(), Counter()
    for verdict in verdicts:
        record = records[verdict["partition"], verdict["offset"]]
        value = parse(record.value() or b"")
        errors = list(payment.iter_errors(value))
        wrong_headers = list(payment_headers.iter_errors(headers_of(record)))
        accepted = not errors and not wrong_headers
        refused = verdict["outcome"] == "dead_lettered"
        said = f"{verdict.get('reason')}: {verdict.get('detail')}"
        if not refused and not accepted:
            fail(f"{place(record)}: the daemon takes it, the schema does not: "
                 f"{[(list(error.path), error.validator) for error in errors + wrong_headers]}")
        if refused and accepted:
            rule = beyond_schemas(verdict)
            # Of one header the schema knows.
            if rule and rule[0] == "unsupported_schema_version" and len(record.headers()) == 1:
                rule = None
            rule or fail(f"{place(record)}: the schema takes it, the daemon does not: {said}")
            beyond[rule] += 1
        if refused and not accepted:
            field = verdict["detail"].split(":")[0]
            of_field = verdict["reason"] in ("missing_field", "invalid_field")
            # A record can break several rules. The daemon names the first one, which has to be one of the schema's,
            # too, unless that is beyond it.
            if of_field and field not in fields_of(errors) and not beyond_schemas(verdict):
                fail(f"{place(record)}: the daemon says {said}, the schema finds {sorted(fields_of(errors))}")
            both[verdict["reason"]] += 1
    for rule in BEYOND_SCHEMAS:
        beyond[rule] or fail(f"no record was refused for {': '.join(rule)}: BEYOND_SCHEMAS is too long, or the records "
                             "are too few")
    accepted = sum(verdict["outcome"] != "dead_lettered" for verdict in verdicts)
    print(f"input: {len(verdicts)} records; taken by daemon and schemas: {accepted}; "
          f"refused by both: {sum(both.values())} "
          f"({', '.join(f'{reason} {count}' for reason, count in sorted(both.items()))})")
    print(f"refused by the daemon alone, as the schema's description says: {sum(beyond.values())}")
    for (reason, detail), count in sorted(beyond.items()):
        print(f"  {reason}: {detail}: {count}")


def fields_of_both(event, record):
    """Fields of an event that are its record's, as the event and as the record has them."""
    found, sent = parse(event.value()), parse(record.value())
    both = {field: (found[field], sent[field]) for field in ("messageId", "custId", "currency", "type")}
    both["amount"] = Decimal(found["amount"]), Decimal(sent["amount"])
    moment = datetime.fromtimestamp(record.timestamp()[1] / 1000, UTC)
    both["createdAt"] = found["createdAt"], f"{moment:%Y-%m-%dT%H:%M:%S}.{record.timestamp()[1] % 1000:03}Z"
    if "version" in found:
        both["status"] = found["status"], sent["status"]
        both["comment"] = found.get("comment"), sent.get("comment") or None
        both["updatedAt"] = found["updatedAt"], found["createdAt"]
    return both


def tight(wanted, outputs, others=False):
    """Fails if a schema of outputs says less than what holds for all of them: fields that are always there are required,
    none is unnamed, and a text of a pattern beside the right one is refused."""
    required = set(wanted["required"]) ^ set.intersection(*map(set, outputs))
    required and fail(f"{wanted['title']}: {sorted(required)}: wrongly required, or wrongly not")
    unnamed = set.union(*map(set, outputs)) - set(wanted["properties"])
    unnamed and not others and fail(f"{wanted['title']}: {sorted(unnamed)}: sent by the daemon, and no property")
    for name, rule in wanted["properties"].items():
        for text in {output[name] for output in outputs[:100] if "pattern" in rule and name in output}:
            for beside in ("", f" {text}", f"{text} ", text[:-1] + "\u00e9", f"-{text}"):
                EXACT(rule).is_valid(beside) and fail(f"{wanted['title']}: {name} may be {beside!r}")


def compare_outputs(bootstrap_servers, records, verdicts):
    """Each output: its schema, its record, its order; and each record that needs one has it."""
    written = {(verdict["partition"], verdict["offset"]) for verdict in verdicts if verdict["outcome"] == "written"}
    event_headers, dead_headers = schema("event-headers"), schema("dead-letter-headers")
    for topic, name in ((READ, "read-event"), (EMAIL, "email-event")):
        validator, outputs = schema(name), read(bootstrap_servers, topic)
        wanted = {place for place in written if topic == READ or parse(records[place].value())["status"] == 2}
        last = {}
        for _, event in sorted(outputs.items()):
            for error in [*validator.iter_errors(parse(event.value())), *event_headers.iter_errors(headers_of(event))]:
                fail(f"{place(event)}: {list(error.path)}: {error.validator}")
            partition, offset = map(int, headers_of(event)["source"].split("/")[1:])
            record = records[partition, offset]
            if event.key() != record.key() or event.key().decode() != str(parse(event.value())["custId"]):
                fail(f"{place(event)}: its key is not that of its record")
            for header in ("correlation-id", "traceparent"):
                if headers_of(event).get(header) != headers_of(record).get(header):
                    fail(f"{place(event)}: {header} is not that of its record")
            for field, (found, sent) in fields_of_both(event, record).items():
                found == sent or fail(f"{place(event)}: {field} is not that of its record")
            if last.get((event.key(), partition), -1) >= offset:
                fail(f"{place(event)}: out of order in its account, or twice")
            last[event.key(), partition] = offset
            wanted.discard((partition, offset))
        wanted and fail(f"{topic}: no event of {len(wanted)} payments that check-messages takes, such as {min(wanted)}")
        tight(validator.schema, [parse(event.value()) for event in outputs.values()])
        tight(event_headers.schema, [headers_of(event) for event in outputs.values()])
        print(f"{topic}: {len(outputs)} events, all by their schema, in order for each account")
    letters, reasons = read(bootstrap_servers, DEAD), Counter()
    for letter in letters.values():
        headers = headers_of(letter)
        for error in dead_headers.iter_errors(headers):
            fail(f"{place(letter)}: header {list(error.path)}: {error.validator}")
        record = records[int(headers["dlq-partition"]), int(headers["dlq-offset"])]
        own = record.headers() or []
        letter.headers()[:len(own)] == own or fail(f"{place(letter)}: not the headers of its record")
        for part, bytes_max in (("key", 64 << 10), ("value", 512 << 10)):
            kept, sent = getattr(letter, part)(), getattr(record, part)()
            said = headers.get(f"dlq-{part}-bytes"), headers.get(f"dlq-{part}-sha256")
            expected = sent, (None, None)
            if sent is not None and len(sent) > bytes_max:
                expected = None, (str(len(sent)), hashlib.sha256(sent).hexdigest())
            (kept, said) == expected or fail(f"{place(letter)}: its {part} is not that of its record")
        reasons[headers["dlq-reason"]] += 1
    tight(dead_headers.schema, [headers_of(letter) for letter in letters.values()], others=True)
    expected = Counter(verdict["reason"] for verdict in verdicts if verdict["outcome"] == "dead_lettered")
    if reasons != expected:
        fail(f"dead letters {reasons}, check-messages {expected}")
    print(f"{DEAD}: {len(letters)} dead letters, all by their schema, with the reasons that check-messages names: "
          f"{', '.join(f'{reason} {count}' for reason, count in sorted(reasons.items()))}")


def compare_clients(records, verdicts):
    """Records of the clients: all are payments, and one account is in one partition, whichever client sent it."""
    partitions, clients = defaultdict(set), Counter()
    for verdict in verdicts:
        record = records[verdict["partition"], verdict["offset"]]
        headers = headers_of(record)
        if re.fullmatch(r"order-\d{1,3}", headers.get("correlation-id") or ""):
            partitions[record.key()].add(record.partition())
            clients[headers["correlation-id"]] += 1
            if verdict["outcome"] != "written":
                fail(f"{place(record)} of a client: {verdict['outcome']}, {verdict.get('detail')}")
            if not re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", headers["traceparent"]):
                fail(f"{place(record)}: traceparent is not of W3C's form")
            if headers["schema-version"] != "1" or uuid.UUID(parse(record.value())["messageId"]).version != 7:
                fail(f"{place(record)}: schema-version is not 1, or the id no UUIDv7")
    if len(clients) != PAYMENTS or set(clients.values()) != {CLIENTS}:
        fail(f"{CLIENTS} clients sent {PAYMENTS} records each; found {clients.most_common()[:1]} to "
             f"{clients.most_common()[-1:]}, {len(clients)} correlation ids")
    for key, numbers in partitions.items():
        len(numbers) == 1 or fail(f"account {key.decode()}: partitions {sorted(numbers)}")
    print(f"clients: {sum(clients.values())} records of {len(partitions)} accounts: each account is in one partition")
    return {key: numbers.pop() for key, numbers in partitions.items()}


def compare_partitioners(bootstrap_servers, partitions):
    """Where librdkafka's default partitioner puts the same accounts."""
    elsewhere = 0

    def on_delivery(error, message):
        nonlocal elsewhere
        error and fail(str(error))
        elsewhere += partitions[message.key()] != message.partition()
    producer = Producer({"bootstrap.servers": bootstrap_servers})
    for key in partitions:
        producer.produce("partitioners", b"", key=key, on_delivery=on_delivery)
    producer.flush(60)
    text = f"of {len(partitions)} accounts it puts {elsewhere} into another of 100 partitions"
    text in (REPOSITORY / "docs/how-to/produce.md").read_text(encoding="utf-8") or fail(
        f"docs/how-to/produce.md does not say of librdkafka's default partitioner: {text}")
    print(f"partitioners: librdkafka's default puts {elsewhere} of {len(partitions)} accounts elsewhere")


def send_edges(bootstrap_servers):
    producer = Producer({"bootstrap.servers": bootstrap_servers, "partitioner": "murmur2_random"})
    sent = 0
    for key, value in edges.messages():
        producer.produce(INPUT, value.encode("utf-8", "surrogatepass"), key=key)
        sent += 1
    for headers in edges.HEADERS:
        key, value = edges.message()
        producer.produce(INPUT, value, key=key, headers=headers)
        sent += 1
    for key, value in edges.LONG:
        producer.produce(INPUT, value, key=key)
        sent += 1
    producer.flush(60) == 0 or fail("records at the borders of the rules could not be sent")
    print(f"sent {sent} records at the borders of the rules")


def main(words):
    if words[0] == "edges":
        send_edges(words[1])
    else:
        bootstrap_servers, verdicts = words[1], Path(words[2]).read_text(encoding="utf-8").splitlines()
        verdicts = [line for line in map(json.loads, verdicts) if "outcome" in line]
        records = read(bootstrap_servers, INPUT)
        if len(records) != len(verdicts):
            fail(f"{len(records)} records in {INPUT}, {len(verdicts)} verdicts")
        if words[0] == "input":
            compare_input(records, verdicts)
            compare_partitioners(bootstrap_servers, compare_clients(records, verdicts))
        else:
            compare_outputs(bootstrap_servers, records, verdicts)


if __name__ == "__main__":
    main(sys.argv[1:])
