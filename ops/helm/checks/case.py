"""The objects of one case, and what must hold of them."""

import json
import pathlib
import re
import subprocess
import tomllib

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[3]


def merged(base, over):
    """Values as Helm merges them: null removes."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    found = {key: value for key, value in base.items() if over.get(key, "") is not None}
    for key, value in over.items():
        if value is not None:
            found[key] = merged(found.get(key), value)
    return found


def known_settings():
    """Settings with their defaults, those that are comments, too."""
    text = (ROOT / "config" / "payment-writer.toml").read_text(encoding="utf-8")
    return tomllib.loads(re.sub(r"(?m)^# (\w+ = )", r"\1", text))


def seconds(text):
    number, unit = re.fullmatch(r"(\d+)(ms|s|m|h|d)", text).groups()
    return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}[unit]


def weight(thing):
    """Events and weight of a hook; None if the object is the release's own."""
    annotations = thing["metadata"].get("annotations", {})
    if "helm.sh/hook" not in annotations:
        return None
    return set(annotations["helm.sh/hook"].split(",")), int(annotations.get("helm.sh/hook-weight", "0"))


def pod_of(thing):
    """Metadata and spec of the pods that an object makes."""
    spec = thing.get("spec", {})
    if thing["kind"] == "Pod":
        return thing["metadata"], spec
    if thing["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    if "template" in spec:
        return spec["template"]["metadata"], spec["template"]["spec"]
    return None


def references(thing):
    """Kind and name of every object that an object names."""
    def walk(node):
        if isinstance(node, list):
            for item in node:
                yield from walk(item)
        elif isinstance(node, dict):
            for key, value in node.items():
                if key in ("secretKeyRef", "secretRef", "credentials") and "name" in value:
                    yield "Secret", value["name"]
                elif key in ("configMapKeyRef", "configMapRef", "configMap") and "name" in value:
                    yield "ConfigMap", value["name"]
                elif key == "secretName":
                    yield "Secret", value
                elif key == "serviceAccountName" and value != "default":
                    yield "ServiceAccount", value
                elif key in ("imagePullSecrets", "secretTargetRef"):
                    yield from (("Secret", item["name"]) for item in value)
                elif key == "serviceName" and thing["kind"] == "StatefulSet":
                    yield "Service", value
                elif key == "scaleTargetRef":
                    yield value["kind"], value["name"]
                elif key == "authenticationRef":
                    yield "TriggerAuthentication", value["name"]
                else:
                    yield from walk(value)
    return set(walk(thing.get("spec", {})))


def external(values):
    """Objects that exist before, by the values that name them."""
    names = {("Secret", item["name"]) for item in values["imagePullSecrets"]}
    names |= {("Secret", volume["secret"]["secretName"]) for volume in values["extraVolumes"] if "secret" in volume}
    if not values["serviceAccount"]["create"]:
        names.add(("ServiceAccount", values["serviceAccount"]["name"]))
    names.add(("TriggerAuthentication", values["autoscaling"]["authenticationRef"]))

    def walk(node):
        if isinstance(node, dict):
            if node.get("existingSecret"):
                names.add(("Secret", node["existingSecret"]))
            for value in node.values():
                walk(value)
    walk(values)
    return names


def covers(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


class Case:
    """The objects of one case, and what is wrong with them."""

    def __init__(self, values, objects):
        self.values, self.objects, self.problems = values, objects, []
        self.by_name = {(thing["kind"], thing["metadata"]["name"]): thing for thing in objects}
        self.daemon = next(thing for thing in objects if thing["kind"] == "StatefulSet")
        self.settings = {name: tomllib.loads(thing["data"]["payment-writer.toml"])
                         for (kind, name), thing in self.by_name.items()
                         if kind == "ConfigMap" and "payment-writer.toml" in thing.get("data", {})}
        self.own = self.settings.get(self.daemon["spec"]["template"]["spec"]["volumes"][0]["configMap"]["name"], {})

    def must(self, holds, problem):
        if not holds:
            self.problems.append(problem)

    def of(self, kind):
        return [thing for thing in self.objects if thing["kind"] == kind]

    def check(self):
        self.must(len(self.by_name) == len(self.objects), "two objects of one kind and name")
        for thing in self.objects:
            what = f"{thing['kind']} {thing['metadata']['name']}"
            labels = thing["metadata"].get("labels", {})
            self.must({"app.kubernetes.io/name", "app.kubernetes.io/instance"} <= set(labels), f"{what}: no labels")
            longest = 52 if thing["kind"] in ("StatefulSet", "CronJob") else 63
            self.must(len(thing["metadata"]["name"]) <= longest, f"{what}: the name is too long")
            self.must(len(json.dumps(thing)) < 262144, f"{what}: too large for kubectl apply")
            self.references(what, thing)
            if found := pod_of(thing):
                self.pod(what, thing, *found)
        self.selectors()
        self.configuration()
        self.features()
        self.scaling()
        return self.problems

    def references(self, what, thing):
        own, outside = weight(thing), external(self.values)
        for kind, name in sorted(references(thing)):
            target = self.by_name.get((kind, name))
            if target is None:
                self.must((kind, name) in outside,
                          f"{what} refers to {kind} {name}, which is neither here nor named by a value")
                continue
            its = weight(target)
            if own is None or "test" in own[0]:
                self.must(its is None, f"{what} refers to {kind} {name}, a hook that is gone by then")
            else:
                self.must(its is not None and own[0] <= its[0] and its[1] < own[1],
                          f"{what} is a hook and refers to {kind} {name}, which is no hook of lower weight")

    def pod(self, what, thing, metadata, spec):
        context = spec.get("securityContext", {})
        self.must(context.get("runAsNonRoot") is True, f"{what}: may run as root")
        self.must(context.get("runAsUser") == self.values["podSecurityContext"].get("runAsUser"), f"{what}: another user")
        self.must(context.get("seccompProfile") == {"type": "RuntimeDefault"}, f"{what}: no seccomp profile")
        self.must(spec.get("automountServiceAccountToken") is False, f"{what}: has a token of the API server")
        self.must(spec.get("enableServiceLinks") is False, f"{what}: has variables of services")
        for key in ("hostNetwork", "hostPID", "hostIPC"):
            self.must(not spec.get(key), f"{what}: {key}")
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        self.must(not any("hostPath" in volume for volume in volumes.values()), f"{what}: hostPath")
        used = set()
        for container in spec["containers"] + spec.get("initContainers", []):
            inner = container.get("securityContext", {})
            self.must(inner.get("allowPrivilegeEscalation") is False and not inner.get("privileged"),
                      f"{what}: privileges")
            self.must(inner.get("readOnlyRootFilesystem") is True, f"{what}: a root that can be written")
            self.must(inner.get("capabilities") == {"drop": ["ALL"]}, f"{what}: capabilities")
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            self.must({"cpu", "memory"} <= set(requests) and "memory" in limits, f"{what}: resources")
            self.must(not container["image"].endswith(":latest"), f"{what}: the image changes")
            mounts = {mount["mountPath"]: volumes.get(mount["name"]) for mount in container.get("volumeMounts", [])}
            self.must(None not in mounts.values(), f"{what}: a mount without a volume")
            used |= {mount["name"] for mount in container.get("volumeMounts", [])}
            names = [variable["name"] for variable in container["env"]]
            self.must(len(names) == len(set(names)), f"{what}: a variable is there twice")
            self.files(what, container, mounts)
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
                if probe in container:
                    self.must(container[probe]["httpGet"]["port"] in ports, f"{what}: {probe} of no port")
                else:
                    self.must(thing is not self.daemon, f"{what}: no {probe}")
        self.must(used == set(volumes), f"{what}: a volume without a mount")
        if weight(thing) and "test" not in weight(thing)[0]:
            self.must(weight(thing)[0] == {"pre-install", "pre-upgrade"}, f"{what}: a hook of other events")
        if thing["kind"] in ("Job", "CronJob"):
            self.must(spec["restartPolicy"] == "Never", f"{what}: restarts in place")
        if thing is self.daemon:
            probe = spec["containers"][0]
            self.must(probe["livenessProbe"]["httpGet"]["path"] == "/livez"
                      and probe["readinessProbe"]["httpGet"]["path"] == "/readyz", f"{what}: probes")
            identity = next((v for v in probe["env"] if v["name"] == "PAYMENT_WRITER__KAFKA__INSTANCE_ID"), {})
            self.must(identity.get("valueFrom") == {"fieldRef": {"fieldPath": "metadata.name"}}, f"{what}: instance_id")
            drain = merged(known_settings(), self.own)["shutdown"]["timeout"]
            self.must(spec["terminationGracePeriodSeconds"] > seconds(drain), f"{what}: is killed while it drains")
            self.must("checksum/settings" in metadata.get("annotations", {}), f"{what}: no checksum of the settings")

    def named_files(self, container):
        """Files that settings and environment name."""
        variables = [variable.get("value") for variable in container["env"]]
        return set(re.findall(r'[ ="](/(?:secrets|tls)/[^" &]*)', json.dumps([self.own, variables])))

    def files(self, what, container, mounts):
        """Every file that settings and environment name is mounted."""
        variables = {variable["name"]: variable.get("value", "") for variable in container["env"]}
        place = mounts.get("/etc/payment-writer") or {}
        file = variables.get("PAYMENT_WRITER_CONFIG")
        self.must(place.get("configMap", {}).get("name") in self.settings
                  and file == "/etc/payment-writer/payment-writer.toml", f"{what}: no settings")
        for path in self.named_files(container):
            folder, name = path.rsplit("/", 1)
            secret = (mounts.get(folder) or {}).get("secret")
            items = secret and secret.get("items")
            is_there = secret and (items is None or name in [item["path"] for item in items])
            self.must(is_there, f"{what}: {path} is not mounted")

    def selectors(self):
        pods = {f"{thing['kind']} {thing['metadata']['name']}": pod_of(thing)[0]["labels"]
                for thing in self.objects if pod_of(thing)}
        daemon = f"StatefulSet {self.daemon['metadata']['name']}"

        def only_daemon(what, selector):
            chosen = [name for name, labels in pods.items() if covers(selector, labels)]
            self.must(chosen == [daemon], f"{what} selects {chosen}")
        only_daemon("the StatefulSet", self.daemon["spec"]["selector"]["matchLabels"])
        for constraint in pod_of(self.daemon)[1].get("topologySpreadConstraints", []):
            only_daemon("a spread", constraint["labelSelector"]["matchLabels"])
        for budget in self.of("PodDisruptionBudget"):
            only_daemon("the PodDisruptionBudget", budget["spec"]["selector"]["matchLabels"])
        ports = {port["name"]: port["containerPort"] for port in pod_of(self.daemon)[1]["containers"][0]["ports"]}
        for service in self.of("Service"):
            only_daemon("the Service", service["spec"]["selector"])
            spec = service["spec"]
            self.must(spec.get("clusterIP") == "None" and spec.get("publishNotReadyAddresses") is True,
                      "the Service is not headless, or hides instances that are not ready")
            self.must(all(ports.get(port["targetPort"]) == port["port"] for port in spec["ports"]), "ports of the Service")
        for monitor in self.of("ServiceMonitor"):
            found = [service for service in self.of("Service")
                     if covers(monitor["spec"]["selector"]["matchLabels"], service["metadata"]["labels"])]
            names = {port["name"] for service in found for port in service["spec"]["ports"]}
            self.must(len(found) == 1 and all(endpoint["port"] in names for endpoint in monitor["spec"]["endpoints"]),
                      "the ServiceMonitor selects no port")
        for policy in self.of("NetworkPolicy"):
            selector = policy["spec"]["podSelector"]["matchLabels"]
            self.must(all(covers(selector, labels) for labels in pods.values()), "the NetworkPolicy leaves pods out")
            opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
            self.must(opened == set(ports.values()), "the NetworkPolicy opens other ports")
            reached = {port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])}
            brokers = self.values["settings"]["kafka"]["bootstrap_servers"].split(",")
            brokers = self.values["networkPolicy"]["kafkaPorts"] or [int(name.rsplit(":", 1)[1]) for name in brokers]
            wanted = {53, 9464, *self.values["networkPolicy"]["postgresPorts"], *brokers}
            if endpoint := self.values["settings"].get("tracing", {}).get("otlp_endpoint"):
                wanted.add(int(endpoint.rsplit(":", 1)[1]))
            self.must(wanted <= reached, f"the NetworkPolicy lets out to {reached}, not to {wanted}")

    def configuration(self):
        known = known_settings()

        def walk(path, given, model):
            for key, value in given.items():
                name = f"{path}{key}"
                if name.startswith("kafka.properties."):
                    continue
                self.must(key in model, f"setting {name} does not exist")
                if isinstance(value, dict):
                    walk(f"{name}.", value, model.get(key, {}))
        for settings in self.settings.values():
            walk("", settings, known)
            self.must(settings == self.own, "settings of hooks differ")
            self.must(merged(settings, self.values["settings"]) == settings, "a setting of the values is not in the file")
            peers = {peer.rsplit(":", 1)[0] for peer in settings.get("console", {}).get("peers", [])}
            self.must(peers <= {service["metadata"]["name"] for service in self.of("Service")}, "peers of another name")
            text = json.dumps(settings)
            self.must(not re.search(r'password": "[^/]|://[^/@"]*:[^/@"]*@', text), "a secret in the settings")

    def features(self):
        values, settings = self.values, self.values["settings"]
        hooks = values["migrate"]["enabled"] or values["topics"]["create"]
        secrets = values["kafka"]["sasl"]["existingSecret"] or (
            values["kafka"]["tls"]["enabled"] and values["kafka"]["tls"]["existingSecret"])
        policy = values["networkPolicy"]["enabled"]
        account = values["serviceAccount"]["create"]
        wanted = {
            "StatefulSet": 1, "Service": 1, "Pod": 1,
            "ConfigMap": 1 + bool(hooks) + values["dashboards"]["enabled"],
            "ServiceAccount": account * (1 + bool(hooks)),
            "Job": values["migrate"]["enabled"] + values["topics"]["create"],
            "CronJob": int(settings.get("idempotency", {}).get("prune_schedule") == ""),
            "PodDisruptionBudget": int(values["podDisruptionBudget"]["enabled"]),
            "NetworkPolicy": policy * (1 + bool(hooks)),
            "ServiceMonitor": int(values["serviceMonitor"]["enabled"]),
            "PrometheusRule": int(values["prometheusRule"]["enabled"]),
            "ScaledObject": int(values["autoscaling"]["enabled"]),
            "TriggerAuthentication": int(values["autoscaling"]["enabled"] and bool(secrets)
                                         and not values["autoscaling"]["authenticationRef"]),
        }
        found = {kind: len(self.of(kind)) for kind in wanted}
        self.must(found == wanted and sum(found.values()) == len(self.objects), f"objects are {found}, not {wanted}")
        for rule in self.of("PrometheusRule"):
            rendered = subprocess.run(
                [ROOT / "ops/prometheus/render", "--job", self.daemon["metadata"]["name"],
                 "--window", settings.get("idempotency", {}).get("window", "7d"),
                 "--runbooks", values["prometheusRule"]["runbooks"]], capture_output=True, text=True, check=True).stdout
            self.must(rule["spec"] == yaml.safe_load(rendered), "the rules are not those of ops/prometheus")
        for (kind, name), thing in self.by_name.items():
            if kind == "ConfigMap" and name.endswith("-dashboards"):
                source = json.loads((ROOT / "ops/grafana/payment-writer.json").read_text(encoding="utf-8"))
                self.must(json.loads(thing["data"]["payment-writer.json"]) == source,
                          "the dashboard is not that of ops/grafana")

    def scaling(self):
        for scaled in self.of("ScaledObject"):
            spec, data = scaled["spec"], scaled["spec"]["triggers"][0]["metadata"]
            self.must("replicas" not in self.daemon["spec"], "KEDA and the StatefulSet both set the number of instances")
            self.must(1 <= spec["minReplicaCount"] <= spec["maxReplicaCount"] <= self.values["topics"]["partitions"],
                      "more instances than partitions")
            settings = merged(known_settings(), self.values["settings"])["kafka"]
            self.must([data["bootstrapServers"], data["consumerGroup"], data["topic"]]
                      == [settings["bootstrap_servers"], settings["group_id"], settings["input_topic"]],
                      "KEDA looks at another group")
            self.must(all(isinstance(value, str) for value in data.values()), "KEDA's metadata are texts")
        if not self.of("ScaledObject"):
            self.must(self.daemon["spec"].get("replicas") == self.values["replicas"], "replicas")
