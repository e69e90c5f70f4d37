"""Compares docs/asyncapi.yaml and the guides with the programs, the topics and the daemon. See `check`."""

import json
import re
import sys
from datetime import datetime
from pathlib import Path

import yaml
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, ConfigResource

from agreement import DEAD, EMAIL, INPUT, READ, REPOSITORY, SCHEMAS, fail, headers_of, parse, read, schema

DOCUMENT = yaml.safe_load((REPOSITORY / "docs/asyncapi.yaml").read_text(encoding="utf-8"))
MESSAGES = DOCUMENT["components"]["messages"]
EVENTS = {READ: MESSAGES["readEvent"]["examples"][0], EMAIL: MESSAGES["emailEvent"]["examples"][0]}
LETTER = MESSAGES["deadLetter"]["examples"][0]

# What must not be, beside what `tight` in agreement.py takes from the daemon's outputs.
REFUSED = {
    "read-event": {
        "id": ["0197b2a4-5f74-44c3-9390-c4ebea15d690", "0197b2a4-5f74-74c3-c390-c4ebea15d690",
               "0197B2A4-5f74-74c3-9390-c4ebea15d690", "0197b2a45f7474c39390c4ebea15d690"],
        "createdAt": ["2025-06-27T18:26:46Z", "2025-06-27T18:26:46.26Z", "2025-06-27T18:26:46.260+00:00",
                      "2025-06-27 18:26:46.260Z", "1999-06-27T18:26:46.260Z", "2100-06-27T18:26:46.260Z"],
        "version": [2, "1", None],
    },
    "event-headers": {"source": ["1F0C2A9B/42/1207", "1f0c2a9/42/1207", "1f0c2a9b/042/1207", "1f0c2a9b/42/01207",
                                 "1f0c2a9b/42/-1", "1f0c2a9b/42", None]},
    "dead-letter-headers": {
        "dlq-reason": ["none", "", None], "dlq-detail": [None], "dlq-topic": ["", None],
        "dlq-partition": ["01", "-1", None], "dlq-timestamp": ["-2", "01", "1.5"],
        "dlq-value-bytes": ["0", "01"], "dlq-value-sha256": ["0" * 63, "A" * 64, "0" * 65],
    },
    "payment-headers": {"schema-version": ["2", "", "1.0"], "correlation-id": [1], "traceparent": [1]},
}
# Names whose rules are the same.
REFUSED["email-event"] = {"id": REFUSED["read-event"]["id"], "createdAt": REFUSED["read-event"]["createdAt"]}
REFUSED["read-event"]["updatedAt"] = REFUSED["read-event"]["createdAt"]
REFUSED["dead-letter-headers"] |= REFUSED["event-headers"] | {
    "dlq-offset": REFUSED["dead-letter-headers"]["dlq-partition"],
    "dlq-key-bytes": REFUSED["dead-letter-headers"]["dlq-value-bytes"],
    "dlq-key-sha256": REFUSED["dead-letter-headers"]["dlq-value-sha256"],
}


def compare_pages():
    """Pages quote the programs exactly; the reasons are those of the contract."""
    programs = {path.read_text(encoding="utf-8"): path for folder in ("java", "python", "go", "rust")
                for path in (REPOSITORY / "ops/clients" / folder).rglob("*")
                if path.suffix in (".java", ".py", ".go", ".rs") and "target" not in path.parts}
    quoted = set()
    for page in ("produce", "consume"):
        text = (REPOSITORY / f"docs/how-to/{page}.md").read_text(encoding="utf-8")
        for language, block in re.findall(r"```(java|python|go|rust)\n(.*?)```", text, re.DOTALL):
            path = programs.get(block) or fail(f"docs/how-to/{page}.md: a block of {language} is no file of ops/clients")
            quoted.add(path)
    for path in set(programs.values()) - quoted:
        fail(f"{path.relative_to(REPOSITORY)} is quoted by no page")
    contract = (REPOSITORY / "docs/reference/contract.md").read_text(encoding="utf-8")
    table = contract.split("| reason | when |")[1].split("\n\n")[0]
    reasons = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    if reasons != schema("dead-letter-headers").schema["properties"]["dlq-reason"]["enum"]:
        fail("dead-letter-headers.schema.json has not the reasons of docs/reference/contract.md")
    print(f"pages: {len(quoted)} programs quoted exactly; reasons: {len(reasons)}")


def compare_schemas():
    """The examples are by the schemas, and a field of an event has the rules that it has in a payment."""
    count = 0
    for name, message in MESSAGES.items():
        for part in ("headers", "payload"):
            reference = message[part].get("$ref")
            for example in message["examples"] if reference else []:
                if part in example:
                    validator = schema(Path(reference).name.removesuffix(".schema.json"))
                    for error in validator.iter_errors(example[part]):
                        fail(f"docs/asyncapi.yaml, example {example['name']}: {list(error.path)}: {error.validator}")
                    count += 1
    used = {Path(message[part]["$ref"]).name for message in MESSAGES.values() for part in ("headers", "payload")
            if "$ref" in message[part]}
    if used != {path.name for path in SCHEMAS.iterdir()}:
        fail("docs/asyncapi.yaml does not use each of docs/schemas")
    payment = schema("payment").schema["properties"]
    # An event has an amount as a number, and no empty comment.
    payment["amount"] = {"description": payment["amount"]["description"], **payment["amount"]["oneOf"][0]}
    payment["comment"] |= {"type": "string", "minLength": 1, "not": {"pattern": payment["comment"]["not"]["pattern"]}}
    for name in ("read-event", "email-event"):
        for field, rule in schema(name).schema["properties"].items():
            differ = {word for word in {*rule, *payment.get(field, rule)} - {"description", "examples"}
                      if rule.get(word) != payment.get(field, rule).get(word)}
            differ and fail(f"{name}.schema.json: {field}: {sorted(differ)} are not those of payment.schema.json")
    refused = 0
    for name, fields in REFUSED.items():
        validator = schema(name)
        for field, values in fields.items():
            for value in values:
                if validator.is_valid(validator.schema["examples"][0] | {field: value}):
                    fail(f"{name}.schema.json: {field} may be {value!r}")
                refused += 1
    letter = schema("dead-letter-headers")
    for field in ("dlq-value-bytes", "dlq-value-sha256", "dlq-key-bytes", "dlq-key-sha256"):
        one = letter.schema["examples"][0] | {field: "9" * 64}
        letter.is_valid(one) and fail(f"dead-letter-headers.schema.json: {field} may be alone")
    print(f"asyncapi.yaml: {count} parts of examples by their schemas; events have the rules of payments; "
          f"{refused} values beside the rules of outputs and headers refused")


def compare_topics(bootstrap_servers):
    """Channels are the topics that `topics create` has made."""
    admin, count = AdminClient({"bootstrap.servers": bootstrap_servers}), 0
    topics = admin.list_topics(timeout=60).topics
    for channel in DOCUMENT["channels"].values():
        name, wanted = channel["address"], channel["bindings"]["kafka"]
        if wanted["topic"] != name or name not in topics or len(topics[name].partitions) != wanted["partitions"]:
            fail(f"docs/asyncapi.yaml: {name}: not a topic of {wanted['partitions']} partitions")
        resource = ConfigResource(ConfigResource.Type.TOPIC, name)
        found = admin.describe_configs([resource])[resource].result(60)
        for setting, value in wanted["topicConfiguration"].items():
            text = ",".join(value) if isinstance(value, list) else str(value)
            found[setting].value == text or fail(f"docs/asyncapi.yaml: {name}: {setting} is {found[setting].value}")
            count += 1
    print(f"topics: {len(DOCUMENT['channels'])} with partitions and {count} settings as in asyncapi.yaml")


def send_examples(bootstrap_servers):
    """The document's payments, at the time that its read event says, and the record of its dead letter."""
    producer = Producer({"bootstrap.servers": bootstrap_servers, "partitioner": "murmur2_random"})
    created_at = datetime.fromisoformat(EVENTS[READ]["payload"]["createdAt"]).timestamp()
    for example in MESSAGES["payment"]["examples"]:
        payload = example["payload"]
        producer.produce(INPUT, json.dumps(payload), key=str(payload["custId"]), headers=example.get("headers"),
                         timestamp=round(created_at * 1000))
    headers = {name: text for name, text in LETTER["headers"].items() if not name.startswith("dlq-") and name != "source"}
    producer.produce(INPUT, LETTER["payload"], key=str(json.loads(LETTER["payload"])["custId"]), headers=headers,
                     timestamp=int(LETTER["headers"]["dlq-timestamp"]))
    producer.flush(60) == 0 or fail("the examples of docs/asyncapi.yaml could not be sent")


# Parts of an output that say where its record is.
PLACE = ("source", "dlq-partition", "dlq-offset")


def without_place(headers):
    return {name: text for name, text in headers.items() if name not in PLACE}


def compare_examples(bootstrap_servers):
    """What the daemon sent for the document's payments are the document's outputs, their place apart."""
    outputs = {topic: read(bootstrap_servers, topic).values() for topic in (READ, EMAIL, DEAD)}
    for example in MESSAGES["payment"]["examples"]:
        number = example["payload"]["messageId"]
        for topic, event in EVENTS.items():
            same = number == event["payload"]["messageId"]
            expected = same or topic == READ or example["payload"]["status"] == 2
            found = [output for output in outputs[topic] if parse(output.value())["messageId"] == number]
            if len(found) != expected:
                fail(f"docs/asyncapi.yaml, payment {example['name']}: {len(found)} events in {topic}")
            if same and parse(found[0].value()) != parse(json.dumps(event["payload"]).encode()):
                fail(f"docs/asyncapi.yaml, {event['name']}: the daemon sends {found[0].value().decode()}")
            if same and without_place(headers_of(found[0])) != without_place(event["headers"]):
                fail(f"docs/asyncapi.yaml, {event['name']}: the daemon sends {headers_of(found[0])}")
    letters = [letter for letter in outputs[DEAD] if letter.value() == LETTER["payload"].encode()]
    if len(letters) != 1 or without_place(headers_of(letters[0])) != without_place(LETTER["headers"]):
        fail(f"docs/asyncapi.yaml, {LETTER['name']}: the daemon sends {[headers_of(letter) for letter in letters]}")
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    group = DOCUMENT["operations"]["receivePayment"]["bindings"]["kafka"]["groupId"]["const"]
    group in [found.group_id for found in admin.list_consumer_groups().result(60).valid] or fail(
        f"docs/asyncapi.yaml: the daemon's group is not {group}")
    print("asyncapi.yaml: the daemon sends the events and the dead letter of the examples, their place apart")


if __name__ == "__main__":
    if sys.argv[1] == "documents":
        compare_pages()
        compare_schemas()
    else:
        {"topics": compare_topics, "send": send_examples, "examples": compare_examples}[sys.argv[1]](sys.argv[2])
