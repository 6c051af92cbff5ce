"""What every rendering must keep: each rule takes all manifests and yields a line for each fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import kubernetes_validate
import yaml
from pydantic import ValidationError

from serving.config import ServeConfig
from serving.option_types import parse_bytes
from tests.k8s.rendering import Manifest, one

KUBERNETES_VERSION = "1.35.0"
RAY_ROOM_BYTES = 2 * 2**30      # beside a shard's memory_budget
# The keys of KubeRay 1.6, as its API reference lists them, that a RayService of ours may have.
_SPEC = {"serveConfigV2", "rayClusterConfig", "upgradeStrategy", "excludeHeadPodFromServeSvc", "serveService",
         "rayClusterDeletionDelaySeconds", "suspend", "managedBy"}
_CLUSTER = {"rayVersion", "authOptions", "gcsFaultToleranceOptions", "enableInTreeAutoscaling", "autoscalerOptions",
            "headGroupSpec", "workerGroupSpecs"}
_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
_CUSTOM = {"RayService", "PodMonitor", "PrometheusRule", "HTTPRoute", "GRPCRoute"}
_UNITS = {"": 1.0, "m": 1e-3, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "k": 1e3, "M": 1e6, "G": 1e9}
RAY_PORTS = {6379, 8265, 10001, 52365}
Rule = Callable[[list[Manifest]], Iterator[str]]


def groups_of(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return head and worker groups by name."""
    cluster = one(manifests, "RayService")["spec"]["rayClusterConfig"]
    return {"head": cluster["headGroupSpec"], **{group["groupName"]: group for group in cluster["workerGroupSpecs"]}}


def config_of(manifests: list[Manifest]) -> ServeConfig:
    serve = yaml.safe_load(one(manifests, "RayService")["spec"]["serveConfigV2"])
    return ServeConfig.model_validate(serve["applications"][0]["args"])


def pods_of(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return all pod templates, of Ray's groups, of Jobs and DaemonSets."""
    others = {each["metadata"]["name"]: each["spec"]["template"] for each in manifests
              if each["kind"] in ("Job", "DaemonSet")}
    return {name: group["template"] for name, group in groups_of(manifests).items()} | others


def quantity(text: object) -> float:
    match = re.fullmatch(r"([0-9.]+)([a-zA-Z]*)", str(text))
    assert match and match[2] in _UNITS, f"{text} is no quantity"
    return float(match[1]) * _UNITS[match[2]]


def follows_the_schemas(manifests: list[Manifest]) -> Iterator[str]:
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **pod.get("metadata", {})},
             "spec": pod["spec"]} for name, pod in pods_of(manifests).items()]
    for manifest in [each for each in manifests if each["kind"] not in _CUSTOM] + pods:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{manifest['kind']} {manifest['metadata']['name']}: {error.message}"
    spec = one(manifests, "RayService")["spec"]
    cluster = spec["rayClusterConfig"]
    for what, keys, known in [("spec", spec, _SPEC), ("rayClusterConfig", cluster, _CLUSTER),
                              *((name, group, _GROUP) for name, group in groups_of(manifests).items())]:
        if unknown := set(keys) - known:
            yield f"RayService: {what} has {sorted(unknown)}"


def carries_a_valid_config(manifests: list[Manifest]) -> Iterator[str]:
    try:
        config = config_of(manifests)
    except ValidationError as error:
        yield str(error)
        return
    groups = groups_of(manifests)
    if not yaml.safe_load(one(manifests, "RayService")["spec"]["serveConfigV2"])["applications"][0].get(
            "external_scaler_enabled"):
        yield "`moesaic scale` cannot work"
    for pool in config.pools:
        if groups[pool.name]["rayStartParams"]["resources"] != f'"{{\\"pool-{pool.name}\\": 1}}"':
            yield f"pool {pool.name}: its pods do not offer {pool.resources}"
        group = groups[pool.name]
        if (group["minReplicas"], group["replicas"], group["maxReplicas"]) != (
                pool.least_replicas, pool.replicas, pool.most_replicas):
            yield f"pool {pool.name}: other numbers of pods than of shards"
    if groups["routers"]["replicas"] != config.router.replicas or config.router.resources != {"routers": 1}:
        yield "routers are not one in each of their pods"
    if groups["head"]["rayStartParams"].get("num-cpus") != "0":
        yield "the head takes work"


def is_restricted(manifests: list[Manifest]) -> Iterator[str]:
    """The pod security standard `restricted`, and a root file system that is read-only. RDMA needs IPC_LOCK."""
    for name, pod in pods_of(manifests).items():
        spec, context = pod["spec"], pod["spec"].get("securityContext", {})
        if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name}: shares a namespace of its node"
        if any(set(volume) - {"name", "emptyDir", "persistentVolumeClaim", "secret", "configMap", "projected"}
               for volume in spec.get("volumes", [])):
            yield f"{name}: a volume of a kind that is not allowed"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name}: no seccomp profile"
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            own = container.get("securityContext", {})
            added = set(own.get("capabilities", {}).get("add", []))
            if (own.get("allowPrivilegeEscalation") is not False or own.get("runAsNonRoot") is not True
                    or own.get("capabilities", {}).get("drop") != ["ALL"] or own.get("privileged")):
                yield f"{name}: may gain privileges"
            if added - {"NET_BIND_SERVICE", "IPC_LOCK"}:
                yield f"{name}: adds {sorted(added)}"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{name}: writes into its image"
            if own.get("runAsUser", context.get("runAsUser")) in (0, None):
                yield f"{name}: no numeric user"


def has_resources_in_order(manifests: list[Manifest]) -> Iterator[str]:
    """Requests and limits of CPU and memory are there, requests are not above limits, and a shard's budget fits."""
    for name, pod in pods_of(manifests).items():
        resources = pod["spec"]["containers"][0]["resources"]
        requests, limits = resources.get("requests", {}), resources.get("limits", {})
        for key in ("cpu", "memory"):
            if key not in requests or key not in limits:
                yield f"{name}: no {key}"
        if over := [key for key in requests if key in limits and quantity(requests[key]) > quantity(limits[key])]:
            yield f"{name}: requests of {over} are above limits"
    for pool in config_of(manifests).pools:
        resources = pods_of(manifests)[pool.name]["spec"]["containers"][0]["resources"]
        if quantity(resources["requests"]["cpu"]) < pool.num_cpus:
            yield f"{pool.name}: fewer CPUs than num_cpus={pool.num_cpus}"
        # Of a CUDA pool the budget is of the GPU's memory.
        if pool.device == "cpu" and pool.memory_budget and (
                quantity(resources["requests"]["memory"]) < parse_bytes(pool.memory_budget) + RAY_ROOM_BYTES):
            yield f"{pool.name}: no room for memory_budget and Ray"


def agrees_on_ports(manifests: list[Manifest]) -> Iterator[str]:
    config = config_of(manifests)
    wanted = {"http": config.http_port, "grpc": config.router.grpc_port}
    pods = pods_of(manifests)
    router = pods["routers"]["spec"]["containers"][0]
    named = {port["name"]: port["containerPort"] for port in router["ports"]}
    if {name: named.get(name) for name in wanted} != wanted:
        yield f"routers: {named} are not the config's {wanted}"
    for name in groups_of(manifests):      # KubeRay asks the proxies at the port of this name
        ports = {port["name"]: port["containerPort"] for port in pods[name]["spec"]["containers"][0]["ports"]}
        if ports.get("serve") != config.proxy_port:
            yield f"{name}: the port `serve` is not proxy_port"
    scheme = {"scheme": "HTTPS"} if config.tls else {}
    if router["readinessProbe"].get("httpGet") != {
            "path": f"{config.route_prefix.rstrip('/')}/health", "port": config.http_port} | scheme:
        yield "routers: the probe does not ask the HTTP door"
    for service in [each for each in manifests if each["kind"] == "Service"]:
        for port in service["spec"]["ports"]:
            if (wanted.get(port["targetPort"]), port["name"]) != (port["port"], port["targetPort"]):
                yield f"Service {service['metadata']['name']}: port {port} is not the config's"


def selects_routers_only(manifests: list[Manifest]) -> Iterator[str]:
    pods = pods_of(manifests)
    for service in [each for each in manifests if each["kind"] == "Service"]:
        found = {name for name, pod in pods.items() if _matches(service["spec"]["selector"], pod)}
        if found != {"routers"} or service["spec"].get("publishNotReadyAddresses"):
            yield f"Service {service['metadata']['name']}: selects {sorted(found)}"


def is_closed_to_others(manifests: list[Manifest]) -> Iterator[str]:
    """Ray's ports are open to this release and the operator; clients reach the routers' doors and nothing else."""
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy"]
    for name in groups_of(manifests):
        pod = pods_of(manifests)[name]
        rules = [rule for policy in policies if _matches(policy["podSelector"].get("matchLabels", {}), pod)
                 for rule in policy["ingress"]]
        if not rules:
            yield f"{name}: no policy: everybody reaches everything"
        ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
        for rule in rules:
            opened = {ports.get(port["port"], port["port"]) for port in rule.get("ports", [])}
            inside = [peer.get("podSelector", {}).get("matchLabels", {}).get("app.kubernetes.io/instance")
                      for peer in rule.get("from", [])] == ["moesaic"]
            if not opened and not inside:
                yield f"{name}: all ports are open to others"
            if opened & RAY_PORTS and not rule.get("from"):
                yield f"{name}: {sorted(opened & RAY_PORTS)} are open to everybody"
            if not rule.get("from") and name != "routers":
                yield f"{name}: clients reach it"


def asks_for_rays_token(manifests: list[Manifest]) -> Iterator[str]:
    if one(manifests, "RayService")["spec"]["rayClusterConfig"].get("authOptions", {}).get("mode") != "token":
        yield "Ray takes orders from everybody who reaches it"


def keeps_secrets_out(manifests: list[Manifest]) -> Iterator[str]:
    if any(each["kind"] == "Secret" for each in manifests):
        yield "a Secret is rendered: its content would be in the release"
    for name, pod in pods_of(manifests).items():
        for env in pod["spec"]["containers"][0].get("env", []):
            is_secret = re.search(r"TOKEN|PASSWORD|SECRET|API_?KEY|OTLP_HEADERS", env["name"])
            if is_secret and "secretKeyRef" not in env.get("valueFrom", {}):
                yield f"{name}: {env['name']} stands in the manifest"
    redis = one(manifests, "RayService")["spec"]["rayClusterConfig"].get("gcsFaultToleranceOptions", {})
    if "value" in redis.get("redisPassword", {}):
        yield "Redis' password stands in the manifest"


def has_time_to_drain(manifests: list[Manifest]) -> Iterator[str]:
    for name, group in groups_of(manifests).items():
        spec = group["template"]["spec"]
        hook = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])[-1]
        seconds = max(map(int, re.findall(r"(?:sleep|timeout|--wait) (\d+)", hook)), default=0)
        if name != "head" and not seconds:
            yield f"{name}: ends without draining"
        if seconds >= spec["terminationGracePeriodSeconds"]:
            yield f"{name}: is killed while it drains"


def mounts_no_token(manifests: list[Manifest]) -> Iterator[str]:
    """The head's autoscaler asks Kubernetes for pods; nobody else asks it anything."""
    autoscales = one(manifests, "RayService")["spec"]["rayClusterConfig"].get("enableInTreeAutoscaling", False)
    for name, pod in pods_of(manifests).items():
        if pod["spec"].get("automountServiceAccountToken") is not (name == "head" and autoscales):
            yield f"{name}: its service account's token"


def _matches(selector: dict[str, str], pod: Manifest) -> bool:
    labels = pod.get("metadata", {}).get("labels", {})
    return all(labels.get(key) == value for key, value in selector.items())


RULES: tuple[Rule, ...] = (
    follows_the_schemas, carries_a_valid_config, is_restricted, has_resources_in_order, agrees_on_ports,
    selects_routers_only, is_closed_to_others, asks_for_rays_token, keeps_secrets_out, has_time_to_drain,
    mounts_no_token)
