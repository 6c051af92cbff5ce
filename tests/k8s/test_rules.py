"""Each rule refuses a manifest that breaks it, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s import rules
from tests.k8s.rendering import Manifest, one, rendered

Break = Callable[[list[Manifest]], object]


def pod(manifests: list[Manifest], group: str) -> Any:
    return rules.groups_of(manifests)[group]["template"]["spec"]


def container(manifests: list[Manifest], group: str) -> Any:
    return pod(manifests, group)["containers"][0]


def spec(manifests: list[Manifest]) -> Any:
    return one(manifests, "RayService")["spec"]


def replace_in_config(manifests: list[Manifest], old: str, new: str) -> None:
    spec(manifests)["serveConfigV2"] = spec(manifests)["serveConfigV2"].replace(old, new)


def without(manifests: list[Manifest], name: str) -> None:
    manifests[:] = [each for each in manifests if each["metadata"]["name"] != name]


BREAKS: list[tuple[rules.Rule, str, Break]] = [
    (rules.follows_the_schemas, "a typo", lambda all: pod(all, "cpu").update(toleration=[])),
    (rules.follows_the_schemas, "no key of a RayService", lambda all: spec(all).update(upgrade={})),
    (rules.follows_the_schemas, "no key of a group", lambda all: rules.groups_of(all)["cpu"].update(image="x")),
    (rules.carries_a_valid_config, "a typo in it",
     lambda all: replace_in_config(all, "memory_budget", "memory_bugdet")),
    (rules.carries_a_valid_config, "more shards than pods",
     lambda all: replace_in_config(all, "replicas: 3", "replicas: 4")),
    (rules.carries_a_valid_config, "nothing to scale by",
     lambda all: replace_in_config(all, "external_scaler_enabled: true", "")),
    (rules.carries_a_valid_config, "pods without the resource",
     lambda all: rules.groups_of(all)["cpu"]["rayStartParams"].update(resources="")),
    (rules.carries_a_valid_config, "a head that works",
     lambda all: rules.groups_of(all)["head"]["rayStartParams"].pop("num-cpus")),
    (rules.is_restricted, "root", lambda all: pod(all, "cpu")["securityContext"].update(runAsUser=0)),
    (rules.is_restricted, "a capability",
     lambda all: container(all, "cpu")["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
    (rules.is_restricted, "a writable image",
     lambda all: container(all, "routers")["securityContext"].pop("readOnlyRootFilesystem")),
    (rules.is_restricted, "the node's network", lambda all: pod(all, "head").update(hostNetwork=True)),
    (rules.is_restricted, "a folder of the node",
     lambda all: pod(all, "cpu")["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
    (rules.is_restricted, "no seccomp", lambda all: pod(all, "cpu")["securityContext"].pop("seccompProfile")),
    (rules.is_restricted, "escalation",
     lambda all: container(all, "cpu")["securityContext"].update(allowPrivilegeEscalation=True)),
    (rules.has_resources_in_order, "requests above limits",
     lambda all: container(all, "cpu")["resources"]["limits"].update(cpu="16500m")),
    (rules.has_resources_in_order, "no limit", lambda all: container(all, "head")["resources"]["limits"].pop("memory")),
    (rules.has_resources_in_order, "too little for the budget",
     lambda all: container(all, "cpu")["resources"]["requests"].update(memory="41Gi")),
    (rules.has_resources_in_order, "too few CPUs",
     lambda all: container(all, "cpu")["resources"]["requests"].update(cpu="8")),
    (rules.agrees_on_ports, "another http_port",
     lambda all: replace_in_config(all, "http_port: 8000", "http_port: 8001")),
    (rules.agrees_on_ports, "another proxy_port", lambda all: replace_in_config(all, "8100", "8101")),
    (rules.agrees_on_ports, "a Service with another port",
     lambda all: one(all, "Service", "moesaic-serve")["spec"]["ports"][1].update(port=9001)),
    (rules.agrees_on_ports, "a probe of another path",
     lambda all: container(all, "routers")["readinessProbe"]["httpGet"].update(path="/")),
    (rules.selects_routers_only, "all pods",
     lambda all: one(all, "Service", "moesaic-serve-grpc")["spec"]["selector"].pop("app.kubernetes.io/component")),
    (rules.selects_routers_only, "pods that are not ready",
     lambda all: one(all, "Service", "moesaic-serve")["spec"].update(publishNotReadyAddresses=True)),
    (rules.is_closed_to_others, "no policy", lambda all: [without(all, f"moesaic-{name}") for name in
                                                          ("inside", "doors", "operator")]),
    (rules.is_closed_to_others, "the dashboard for everybody",
     lambda all: one(all, "NetworkPolicy", "moesaic-operator")["spec"]["ingress"][0].pop("from")),
    (rules.is_closed_to_others, "all ports for everybody",
     lambda all: one(all, "NetworkPolicy", "moesaic-inside")["spec"]["ingress"][0].pop("from")),
    (rules.asks_for_rays_token, "no token", lambda all: spec(all)["rayClusterConfig"].pop("authOptions")),
    (rules.keeps_secrets_out, "a token in the environment",
     lambda all: container(all, "cpu")["env"].append({"name": "HF_TOKEN", "value": "hf_x"})),
    (rules.keeps_secrets_out, "a Secret", lambda all: all.append({"kind": "Secret", "metadata": {"name": "x"}})),
    (rules.keeps_secrets_out, "a password", lambda all: spec(all)["rayClusterConfig"].update(
        gcsFaultToleranceOptions={"redisPassword": {"value": "x"}})),
    (rules.has_time_to_drain, "a short grace", lambda all: pod(all, "cpu").update(terminationGracePeriodSeconds=90)),
    (rules.has_time_to_drain, "no hook", lambda all: container(all, "routers").pop("lifecycle")),
    (rules.mounts_no_token, "a mounted token", lambda all: pod(all, "routers").pop("automountServiceAccountToken")),
]


@pytest.mark.parametrize(("rule", "breaks"), [(rule, breaks) for rule, _, breaks in BREAKS],
                         ids=[f"{rule.__name__}: {what}" for rule, what, _ in BREAKS])
def test_a_rule_sees_what_breaks_it(rule: rules.Rule, breaks: Break) -> None:
    manifests = rendered(None)
    breaks(manifests)
    assert list(rule(manifests))


def test_every_rule_has_a_manifest_that_it_refuses() -> None:
    assert {rule for rule, _, _ in BREAKS} == set(rules.RULES)
