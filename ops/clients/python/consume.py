import json
import sys
from decimal import Decimal

from confluent_kafka import Consumer

bootstrap_servers, topic, group = sys.argv[1:]
consumer = Consumer({
    "bootstrap.servers": bootstrap_servers,
    "group.id": group,
    "isolation.level": "read_committed",
    "auto.offset.reset": "earliest",
    "enable.auto.commit": False,
})
consumer.subscribe([topic])
seen = set()  # in a service: a unique column of its database
total = Decimal(0)
patience_s = 20
while records := consumer.consume(500, timeout=patience_s):
    patience_s = 5
    for record in records:
        if record.error():
            sys.exit(str(record.error()))
        # The same for a record that this group reads twice, as after a crash before its commit.
        source = dict(record.headers())["source"].decode()
        if source not in seen:
            seen.add(source)
            event = json.loads(record.value(), parse_float=Decimal, parse_int=Decimal)
            total += event["amount"]
    consumer.commit(asynchronous=False)  # after the work, never before
consumer.close()
print(f"events {len(seen)}, sum of amounts {total.normalize():f}")
