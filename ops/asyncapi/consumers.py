"""Runs the consumers of docs/how-to/consume.md over what the daemon published, and what must not be read beside it. See
`check`. Called with brokers, and for each consumer its name and its command as one word."""

import fcntl
import os
import shlex
import subprocess
import sys
import termios
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from confluent_kafka import ConsumerGroupState, Producer
from confluent_kafka.admin import AdminClient

from agreement import EMAIL, READ, fail, headers_of, parse, read

ABORTED, REPEATED = 300, 100
ABORTED_ID = "00000000-0000-7000-8000-000000000000"


def line_of(event):
    """What a consumer prints of an event."""
    fields = parse(event.value())
    return f"{headers_of(event)['source']} {event.key().decode()} {fields['id']} {fields['amount']}"


def send_beside(bootstrap_servers, topic, events):
    """Events of an aborted transaction, as of a daemon that was killed, and events that stand in the topic again, as one
    that a group reads twice."""
    producer = Producer({"bootstrap.servers": bootstrap_servers, "transactional.id": f"check-{topic}"})
    producer.init_transactions(60)
    producer.begin_transaction()
    for number, event in enumerate(events[:ABORTED]):
        source = f"{headers_of(event)['source'].split('/')[0]}/0/{10**9 + number}"
        value = event.value().replace(parse(event.value())["id"].encode(), ABORTED_ID.encode())
        producer.produce(topic, value, key=event.key(), partition=event.partition(), headers={"source": source})
    producer.flush(60) == 0 or fail("events of an aborted transaction could not be sent")
    producer.abort_transaction(60)
    producer.begin_transaction()
    for event in events[:REPEATED]:
        producer.produce(topic, event.value(), key=event.key(), partition=event.partition(), headers=event.headers())
    producer.commit_transaction(60)


def in_order(lines):
    """Whether the events of each account come in the order of their records."""
    last = {}
    for line in lines:
        source, account, *_ = line.split()
        _, partition, offset = source.split("/")
        if last.get((account, partition), -1) >= int(offset):
            return False
        last[account, partition] = int(offset)
    return True


def compare(who, lines, wanted):
    aborted = sum(ABORTED_ID in line for line in lines)
    aborted and fail(f"{who}: {aborted} events of an aborted transaction")
    twice = sum(count > 1 for count in Counter(line.split()[0] for line in lines).values())
    twice and fail(f"{who}: does the work of {twice} events twice in one run")
    missing, others = set(wanted) - set(lines), set(lines) - set(wanted)
    if missing or others:
        fail(f"{who}: of {len(wanted)} events {len(missing)} are missing, and {len(others)} are others; such as "
             f"{sorted(missing)[:1]}, {sorted(others)[:1]}")
    in_order(lines) or fail(f"{who}: events of an account are not in the order of their records")


def run(who, command, *words):
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=300)
    done.returncode == 0 or fail(f"{who}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout.splitlines()


def killed_in_its_work(command, *words):
    """What a consumer printed until it was killed. It stands still in the middle of its work, as nobody reads what it
    prints and a pipe holds 64 KiB."""
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    held, since, limit = 0, time.monotonic(), time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None and (held == 0 or time.monotonic() - since < 2):
        time.sleep(0.1)
        now = int.from_bytes(fcntl.ioctl(process.stdout, termios.FIONREAD, bytes(4)), sys.byteorder)
        if now != held:
            held, since = now, time.monotonic()
    process.kill()
    printed = process.stdout.read().decode()
    process.wait()
    # The last one was not printed whole: its work is not done.
    return printed[:printed.rfind("\n") + 1].splitlines()


def wait_until_empty(bootstrap_servers, group):
    """Waits until a killed member is no longer in its group: `session.timeout.ms`, 45 s by default."""
    admin, limit = AdminClient({"bootstrap.servers": bootstrap_servers}), time.monotonic() + 180
    while time.monotonic() < limit:
        described = admin.describe_consumer_groups([group])[group].result(30)
        if described.state == ConsumerGroupState.EMPTY:
            return
        time.sleep(1)
    fail(f"{group}: a killed member is still in the group")


def check(bootstrap_servers, name, command, wanted):
    """One consumer of the guide: what the page promises of it."""
    report = []
    for topic in (READ, EMAIL):
        who, group = f"{name} on {topic}", f"guide-{name}-{topic}"
        compare(who, run(who, command, bootstrap_servers, topic, group), wanted[topic])
        report.append(f"{len(wanted[topic])} events of {topic}")
    again = run(who, command, bootstrap_servers, EMAIL, group)
    again and fail(f"{who}: a second run of its group reads {len(again)} events again")
    who, group = f"{name}, killed,", f"guide-{name}-killed"
    before = killed_in_its_work(command, bootstrap_servers, READ, group)
    0 < len(before) < len(wanted[READ]) or fail(f"{who} has printed {len(before)} of {len(wanted[READ])} events")
    wait_until_empty(bootstrap_servers, group)
    after = run(who, command, bootstrap_servers, READ, group)
    # Its memory of what it has seen is gone, so it repeats what it had not committed.
    known = set(before)
    compare(who, before + [line for line in after if line not in known], wanted[READ])
    return (f"{name}: exactly {' and '.join(report)}, none again in its second run; killed after {len(before)}, it "
            f"goes on with {len(after)}, {len(known.intersection(after))} of them again, and misses none")


def main(bootstrap_servers, *consumers):
    wanted = {}
    for topic in (READ, EMAIL):
        events = [event for _, event in sorted(read(bootstrap_servers, topic).items())]
        len(events) >= ABORTED or fail(f"{topic}: too few events: {len(events)}")
        wanted[topic] = [line_of(event) for event in events]
        send_beside(bootstrap_servers, topic, events)
    print(f"in each of {READ} and {EMAIL}: {ABORTED} events of an aborted transaction, {REPEATED} events repeated")
    with ThreadPoolExecutor() as pool:
        checks = [pool.submit(check, bootstrap_servers, name, shlex.split(command), wanted)
                  for name, command in (consumer.split("=", 1) for consumer in consumers)]
        for done in checks:
            print(done.result(), flush=True)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SystemExit as failed:
        # Without waiting for consumers that still run; they end by themselves.
        print(failed.code, file=sys.stderr, flush=True)
        os._exit(1)
