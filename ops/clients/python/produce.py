import secrets
import sys
import time
import uuid

from confluent_kafka import KafkaException, Producer


def uuid7():
    """A UUID of version 7; Python 3.14 has uuid.uuid7."""
    bits = int(time.time() * 1000) << 80 | 7 << 76 | secrets.randbits(12) << 64 | 2 << 62 | secrets.randbits(62)
    return uuid.UUID(int=bits)


bootstrap_servers, topic, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
producer = Producer({
    "bootstrap.servers": bootstrap_servers,
    "transactional.id": "shop-python-1",
    "partitioner": "murmur2_random",
    "compression.type": "zstd",
})


def send(payments):
    """Sends payments in one transaction: all of them or none."""
    delivered = 0

    def on_delivery(error, message):
        """librdkafka can report a record as delivered that is not in the log; it has no offset then."""
        nonlocal delivered
        if error is None and message.offset() is not None and message.offset() >= 0:
            delivered += 1

    producer.begin_transaction()
    for n, (message_id, account, amount) in enumerate(payments):
        value = (f'{{"messageId":"{message_id}","amount":{amount},"status":2,"currency":"EUR",'
                 f'"custId":{account},"type":"BWI"}}')
        headers = {"schema-version": "1", "correlation-id": f"order-{n}",
                   "traceparent": f"00-{message_id.hex}-{n + 1:016x}-01"}
        while True:
            try:
                producer.produce(topic, value, key=str(account), headers=headers, on_delivery=on_delivery)
                break
            except BufferError:  # the client's queue is full
                producer.poll(0.1)
        producer.poll(0)
    producer.flush()
    if delivered != len(payments):
        producer.abort_transaction()
        sys.exit("not all records are in the log: send the same payments again, with the same ids")
    try:
        producer.commit_transaction()
    except KafkaException as error:
        if error.args[0].txn_requires_abort():
            producer.abort_transaction()
        raise


producer.init_transactions()
# The id is made once for each payment and stored with it: a repeat has the same one.
send([(uuid7(), n % 50 + 1, f"{n + 1}.50") for n in range(count)])
print("sent", count)
