import json
import sys
import time
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
end = time.monotonic() + 20
while time.monotonic() < end:
    # Waits until there are 500, or until the time is over: a long one would delay the few.
    records = consumer.consume(500, timeout=0.2)
    for record in records:
        if record.error():
            sys.exit(str(record.error()))
        # The same for a record that this group reads twice, as after a crash before its commit.
        source = dict(record.headers())["source"].decode()
        if source not in seen:
            seen.add(source)
            event = json.loads(record.value(), parse_float=Decimal, parse_int=Decimal)
            print(source, record.key().decode(), event["id"], f"{event['amount']:f}", flush=True)  # the work
    if records:
        consumer.commit(asynchronous=False)  # after the work, never before
        end = time.monotonic() + 5
consumer.close()
