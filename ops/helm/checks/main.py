#!/usr/bin/env python3
"""Checks the objects that `helm template` made of the chart with the values of each case.

    ops/helm/checks/main.py FOLDER     FOLDER has a file NAME.yaml for each ops/helm/cases/NAME.yaml

Needs PyYAML, kubernetes-validate and tsc, which ops/helm/check sets up. PROGRAM checks
arguments and settings, too. Each check is seen to refuse something: mutations.py breaks the objects of the case `all`.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

from kubernetes_validate import utils as kubernetes
import yaml

import mutations
from case import ROOT, Case, merged, pod_of
from container import container_of, environment

HELM = ROOT / "ops" / "helm"
OLDEST = "1.29"
# Objects of operators; their types are checked by the TypeScript compiler.
OPERATORS = {
    "ServiceMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor",
    "PrometheusRule": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule",
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject",
    "TriggerAuthentication": "@kubernetes-models/keda/keda.sh/v1alpha1/TriggerAuthentication",
}


def validate(thing, version):
    """What Kubernetes of this version would refuse: unknown fields, too."""
    try:
        kubernetes.validate(thing, version, strict=True)
    except (kubernetes.ValidationError, kubernetes.SchemaNotFoundError) as error:
        return f"{thing['kind']} {thing['metadata']['name']}, Kubernetes {version}: {error.message}"
    return None


def typescript(things):
    """A program that compiles only if the objects have the types of their operators."""
    lines = [f"import type {{ I{kind} }} from {json.dumps(path)};" for kind, path in OPERATORS.items()]
    lines += [f"export const o{number}: I{thing['kind']} = {json.dumps(thing)};" for number, thing in enumerate(things)]
    return "\n".join(lines) + "\n"


def compiled(things):
    """The compiler's complaints."""
    modules = ROOT / ".local/chart/npm"
    with tempfile.NamedTemporaryFile("w", suffix=".mts", dir=modules, encoding="utf-8") as file:
        file.write(typescript(things))
        file.flush()
        return subprocess.run([modules / "node_modules/.bin/tsc", "--noEmit", "--strict", "--skipLibCheck", "--module",
                               "nodenext", "--target", "es2022", file.name],
                              capture_output=True, text=True, check=False).stdout


def refused(case, program):
    """What the program says of the arguments of each pod, and `check-config` of the settings, with the files and variables
    of the daemon's container."""
    for thing in filter(pod_of, case.objects):
        args = container_of(thing)["args"]
        # An argument that it does not know is an error before --help.
        if said := subprocess.run([program, *args, "--help"], capture_output=True, text=True, check=False).stderr:
            return f"{args}: {said}"
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run([program, "check-config"], env=environment(case, case.daemon, place),
                              capture_output=True, text=True, check=False)
        return done.returncode and done.stdout + done.stderr


def main():
    folder, program = pathlib.Path(sys.argv[1]), os.environ["PROGRAM"]
    default = yaml.safe_load((HELM / "payment-writer" / "values.yaml").read_text(encoding="utf-8"))
    versions = [version for version in kubernetes.all_versions()
                if tuple(map(int, version.split(".")[:2])) >= tuple(map(int, OLDEST.split(".")))]
    problems, count, operators, cases, checksums = [], 0, [], sorted((HELM / "cases").glob("*.yaml")), {}
    for file in cases:
        values = merged(default, yaml.safe_load(file.read_text(encoding="utf-8")))
        objects = [thing for thing in yaml.safe_load_all((folder / file.name).read_text(encoding="utf-8")) if thing]
        case = Case(values, objects)
        found = case.check()
        # The versions between the first and the last are tried with all features.
        for version in versions if file.stem in ("all", "default") else (versions[0], versions[-1]):
            found += filter(None, (validate(thing, version) for thing in objects if thing["kind"] not in OPERATORS))
        operators += [thing for thing in objects if thing["kind"] in OPERATORS]
        checksums[file.stem] = pod_of(case.daemon)[0]["annotations"]["checksum/settings"]
        count += len(objects)
        problems += [f"{file.stem}: {problem}" for problem in found]
        if (said := refused(case, program)):
            problems.append(f"{file.stem}: {said}")
        if file.stem == "all":
            problems += mutations.accepted(values, objects)
            problems += (f"a {thing['kind']} with an unknown field was accepted" for thing in mutations.unknown(objects)
                         if not (compiled([thing]) if thing["kind"] in OPERATORS else validate(thing, versions[-1])))
    if said := compiled(operators):
        problems.append(said)
    if not checksums["default"] == checksums["small"] != checksums["sasl"]:
        problems.append("the checksum does not follow the settings alone")
    if problems:
        sys.exit("\n".join(problems) + f"\n\nops/helm/checks: {len(problems)} problems")
    print(f"objects: {count} of {len(cases)} cases, Kubernetes {versions[0]} to {versions[-1]}, "
          f"{len(mutations.MUTATIONS) + len(mutations.UNKNOWN)} changes refused, "
          "settings and arguments read by the program")


if __name__ == "__main__":
    main()
