#!/usr/bin/env python3
"""Runs what the chart's objects say, without Kubernetes, against a Kafka and a Postgres of dev/servers.

    PROGRAM=target/release/payment-writer ops/helm/checks/run.py

Hooks by their weight, then the instances, probed as the kubelet does and scraped as the ServiceMonitor says; doctor and
prune; SIGTERM, which must end each within its grace period. All as user 65532 without privileges, if root runs this.
"""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import yaml

from case import ROOT, Case, merged, weight
from container import TOKEN, container_of, environment

PROGRAM = os.environ["PROGRAM"]
READY_S_MAX = 120
USER = ["setpriv", "--reuid=65532", "--regid=65532", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def status(port, path, token=None):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def rendered(brokers):
    values = {
        "settings": {"kafka": {"bootstrap_servers": brokers}, "idempotency": {"prune_schedule": ""}},
        "topics": {"partitions": 12, "outputPartitions": 6, "replicationFactor": 1},
        "postgres": {"housekeepingUrlKey": "owner"}, "admin": {"token": {"existingSecret": "token"}, "metricsPort": 9465},
        "serviceMonitor": {"enabled": True}}
    default = yaml.safe_load((ROOT / "ops/helm/payment-writer/values.yaml").read_text(encoding="utf-8"))
    text = subprocess.run(["helm", "template", "payment-writer", ROOT / "ops/helm/payment-writer", "--kube-version", "1.29.0",
                           "--values", "-"], input=yaml.safe_dump(values), capture_output=True, text=True, check=True).stdout
    return Case(merged(default, values), [thing for thing in yaml.safe_load_all(text) if thing])


def main():
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        servers = [ROOT / "dev/servers", "--dir", f"{place}/servers"]
        stack.callback(subprocess.run, [*servers, "destroy"], capture_output=True, check=False)
        up = subprocess.run([*servers, "up", "--owner-pid", str(os.getpid())], capture_output=True, text=True, check=False,
                            env={**os.environ, "KAFKA_JVM": "light"})
        if up.returncode:
            sys.exit(f"dev/servers up: {up.stderr}")
        exports = subprocess.run([*servers, "env"], capture_output=True, text=True, check=True).stdout
        brokers, url = (re.search(rf"PAYMENT_WRITER__{key}=(\S+)", exports)[1] for key in ("KAFKA__BOOTSTRAP_SERVERS", "POSTGRES__URL"))
        program = shutil.copy(PROGRAM, f"{place}/payment-writer")
        os.chmod(place, 0o755)
        case = rendered(brokers)

        def process(thing, pod, args=None, ports=("127.0.0.1:0",) * 2, **how):
            folder = pathlib.Path(place, pod)
            folder.mkdir(exist_ok=True)
            variables = environment(case, thing, folder, url, pod)
            variables.update(PAYMENT_WRITER__ADMIN__LISTEN=ports[0], PAYMENT_WRITER__ADMIN__METRICS_LISTEN=ports[1])
            words = [*(USER if os.geteuid() == 0 else []), program, *(args or container_of(thing)["args"])]
            return subprocess.Popen(words, env=variables, text=True, **how)

        def command(what, thing, args=None):
            done = process(thing, what, args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            said = done.communicate()[0]
            if done.returncode:
                sys.exit(f"{what}: exit code {done.returncode}\n{said}")

        jobs = sorted(case.of("Job"), key=lambda job: weight(job)[1])
        for job in jobs:
            command(container_of(job)["name"], job)
        daemon, instances = container_of(case.daemon), []
        for number in range(case.daemon["spec"]["replicas"]):
            ports = {port["name"]: free_port() for port in daemon["ports"]}
            log = stack.enter_context(open(f"{place}/{number}.log", "w+", encoding="utf-8"))
            instance = process(case.daemon, f"payment-writer-{number}", None, [f"127.0.0.1:{port}" for port in ports.values()],
                               stdout=log, stderr=log)
            stack.callback(instance.kill)
            instances.append((instance, ports, log))
        for instance, ports, log in instances:
            for name in ("startupProbe", "livenessProbe", "readinessProbe"):
                probe, until = daemon[name]["httpGet"], time.monotonic() + READY_S_MAX
                while status(ports[probe["port"]], probe["path"]) != 200:
                    if time.monotonic() > until or instance.poll() is not None:
                        log.seek(0)
                        sys.exit(f"{name} fails\n{log.read()[-2000:]}")
                    time.sleep(0.1)
        command("produce", case.daemon, ["produce", "--yes", "--count", "20000"])
        endpoint = case.of("ServiceMonitor")[0]["spec"]["endpoints"][0]
        for _, ports, _ in instances:
            found = [status(ports[endpoint["port"]], endpoint["path"]), status(ports["admin"], "/status"),
                     status(ports["admin"], "/status", TOKEN)]
            if found != [200, 401, 200]:
                sys.exit(f"metrics, status without and with token: {found}")
        command("doctor", case.of("Pod")[0])
        command("prune", case.of("CronJob")[0])
        for instance, _, log in reversed(instances):
            instance.send_signal(signal.SIGTERM)
            code = instance.wait(case.daemon["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])
            if code:
                log.seek(0)
                sys.exit(f"exit code {code} after SIGTERM\n{log.read()[-2000:]}")
        # What the last instance left is written by a third, which is told to stop by then.
        command("rest", case.daemon, ["run", "--until-caught-up"])
        command("reconcile", case.daemon, ["reconcile"])
        names = ", ".join(container_of(job)["name"] for job in jobs)
        print(f"run without Kubernetes: {names}, {len(instances)} instances ready, 20,000 payments, doctor, prune, drained, reconciled")


if __name__ == "__main__":
    main()
