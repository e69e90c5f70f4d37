"""Objects that are broken on purpose, and what must be said of each."""

import copy

from case import Case, weight
from container import container_of


def edit(objects, kind, change, hook=None):
    """Changes the first object of this kind; with `hook`, the first that is a hook or not, or whose name ends so."""
    thing = next(t for t in objects if t["kind"] == kind
                 and (t["metadata"]["name"].endswith(hook) if isinstance(hook, str) else hook in (None, weight(t) is not None)))
    change(thing)


def set_at(*path):
    *way, key, value = path

    def change(thing):
        for step in way:
            thing = thing[step]
        thing[key] = value
    return change


def drop_at(*path):
    *way, key = path

    def change(thing):
        for step in way:
            thing = thing[step]
        del thing[key]
    return change


HOOK_WEIGHT = ("metadata", "annotations", "helm.sh/hook-weight")
POD = ("spec", "template", "spec")
MAIN = (*POD, "containers", 0)
# What is broken on purpose: kind, hook or not, change, and a part of what must be said.
MUTATIONS = [
    ("ConfigMap", True, set_at(*HOOK_WEIGHT, "-1"), "no hook of lower weight"),
    ("ServiceAccount", True, drop_at("metadata", "annotations"), "no hook of lower weight"),
    ("ConfigMap", True, set_at("metadata", "annotations", "helm.sh/hook", "pre-install"), "no hook of lower weight"),
    ("StatefulSet", None, set_at(*POD, "serviceAccountName", "payments-hooks"), "gone by then"),
    ("StatefulSet", None, set_at(*POD, "serviceAccountName", "other"), "neither here nor named"),
    ("TriggerAuthentication", None, set_at("metadata", "name", "other"), "neither here nor named"),
    ("StatefulSet", None, drop_at(*POD, "securityContext"), "may run as root"),
    ("Job", None, drop_at(*MAIN, "securityContext"), "a root that can be written"),
    ("CronJob", None, lambda thing: container_of(thing)["securityContext"].pop("capabilities"), "capabilities"),
    ("Pod", None, lambda thing: thing["spec"].pop("automountServiceAccountToken"), "token of the API server"),
    ("Job", None, drop_at(*MAIN, "resources", "limits"), "resources"),
    ("StatefulSet", None, set_at(*POD, "terminationGracePeriodSeconds", 120), "killed while it drains"),
    ("StatefulSet", None, drop_at("spec", "template", "metadata", "annotations"), "no checksum"),
    ("StatefulSet", None, drop_at(*MAIN, "env", 0), "instance_id"),
    ("StatefulSet", None, set_at(*MAIN, "readinessProbe", "httpGet", "port", "web"), "of no port"),
    ("StatefulSet", None, set_at(*MAIN, "livenessProbe", "httpGet", "path", "/readyz"), "probes"),
    ("StatefulSet", None, drop_at(*POD, "volumes", 2), "a mount without a volume"),
    ("StatefulSet", None, drop_at(*MAIN, "volumeMounts", 2), "is not mounted"),
    ("Job", None, set_at("spec", "template", "metadata", "labels", "app.kubernetes.io/component", "daemon"), "selects"),
    ("Service", None, set_at("spec", "selector", "app.kubernetes.io/component", "web"), "the Service selects []"),
    ("Service", None, set_at("metadata", "name", "other"), "peers of another name"),
    ("Service", None, drop_at("spec", "publishNotReadyAddresses"), "hides instances"),
    ("PodDisruptionBudget", None, drop_at("spec", "selector", "matchLabels", "app.kubernetes.io/component"), "selects"),
    ("ServiceMonitor", None, set_at("spec", "endpoints", 0, "port", "web"), "selects no port"),
    ("NetworkPolicy", None, set_at("spec", "podSelector", "matchLabels", "app.kubernetes.io/component", "daemon"), "leaves pods out"),
    ("NetworkPolicy", None, drop_at("spec", "egress", 2), "lets out to"),
    ("ConfigMap", False, lambda thing: thing["data"].update({"payment-writer.toml": "[kafka]\ngroup = 'x'"}), "does not exist"),
    ("ConfigMap", True, lambda thing: thing["data"].update({"payment-writer.toml": "lanes = 1"}), "settings of hooks differ"),
    ("ConfigMap", False, lambda thing: thing["data"].update(
        {"payment-writer.toml": "[postgres]\nurl = 'postgres://a:b@c/d'"}), "a secret in the settings"),
    ("PrometheusRule", None, set_at("spec", "groups", 0, "rules", 0, "expr", "1"), "rules are not those"),
    ("ConfigMap", False, lambda thing: thing["metadata"].update(name="payment-writer-dashboards",), "two objects"),
    ("ConfigMap", "-dashboards", set_at("data", "payment-writer.json", "{}"), "the dashboard is not that"),
    ("ScaledObject", None, set_at("spec", "maxReplicaCount", 101), "more instances than partitions"),
    ("ScaledObject", None, set_at("spec", "triggers", 0, "metadata", "topic", "other"), "another group"),
    ("StatefulSet", None, set_at("spec", "replicas", 3), "both set the number"),
    ("StatefulSet", None, set_at("metadata", "name", "a" * 53), "too long"),
]
# Fields that do not exist, and fields of another type.
UNKNOWN = [
    ("StatefulSet", set_at(*MAIN, "comand", ["x"])), ("StatefulSet", set_at("spec", "replicas", "two")),
    ("Job", set_at("spec", "backofLimit", 1)), ("CronJob", set_at("spec", "timezone", "Etc/UTC")),
    ("Service", set_at("spec", "publishNotReadyAdresses", True)), ("Pod", set_at("spec", "restart", "Never")),
    ("PodDisruptionBudget", set_at("spec", "maxUnavailble", 1)), ("NetworkPolicy", set_at("spec", "ingres", [])),
    ("ConfigMap", set_at("date", {})), ("ServiceAccount", set_at("spec", {})),
    ("ServiceMonitor", set_at("spec", "endpoints", 0, "prt", "admin")),
    ("PrometheusRule", set_at("spec", "groups", 0, "rules", 0, "exp", "1")),
    ("ScaledObject", set_at("spec", "maxReplicas", 3)), ("TriggerAuthentication", set_at("spec", "secretTargetRef", 0, "nam", "x")),
]


def accepted(values, objects):
    """Changes that no check refused."""
    for kind, hook, change, said in MUTATIONS:
        changed = copy.deepcopy(objects)
        edit(changed, kind, change, hook)
        if not any(said in problem for problem in Case(values, changed).check()):
            yield f"a changed {kind} was not refused with {said!r}"


def unknown(objects):
    """Objects with a field that does not exist, or of another type."""
    for kind, change in UNKNOWN:
        thing = copy.deepcopy(next(t for t in objects if t["kind"] == kind))
        change(thing)
        yield thing
