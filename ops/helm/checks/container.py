"""A container of the chart as a process on this machine: its variables, and its files in a folder."""

import functools
import os
import pathlib
import subprocess

from case import pod_of

TOKEN = "0123456789abcdef"


@functools.cache
def certificate():
    """A certificate with its key, for any file of TLS."""
    return subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                           "-subj", "/CN=payments", "-keyout", "-"], capture_output=True, text=True, check=True).stdout


def container_of(thing):
    return pod_of(thing)[1]["containers"][0]


def environment(case, thing, place, url="postgresql://a:b@db/payments", pod="pod"):
    """Variables of the object's container. The settings and every file that they name are below `place`."""
    container = container_of(thing)

    def here(text):
        for folder in ("/secrets/", "/tls/"):
            text = text.replace(f'"{folder}', f'"{place}{folder}').replace(f"={folder}", f"={place}{folder}")
        return text
    for path in case.named_files(container):
        file = pathlib.Path(f"{place}{path}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(certificate() if path.startswith("/tls/") else TOKEN, encoding="utf-8")
    settings = pathlib.Path(place, "payment-writer.toml")
    settings.write_text(here(next(thing["data"]["payment-writer.toml"] for thing in case.of("ConfigMap")
                                  if "payment-writer.toml" in thing["data"])), encoding="utf-8")
    variables = {"PATH": os.environ["PATH"]}
    for variable in container["env"]:
        given = variable.get("valueFrom", {})
        name = variable["name"]
        if "fieldRef" in given:
            variables[name] = pod
        elif "secretKeyRef" in given:
            variables[name] = url if name.endswith("URL") else "a"
        else:
            variables[name] = f"{place}{variable['value']}" if variable["value"].startswith("/secrets/") else variable["value"]
    return {**variables, "PAYMENT_WRITER_CONFIG": str(settings)}
