"""The configs that the manifests carry are ones that `moesaic up` would take."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from serving.config import ServeConfig

K8S = Path(__file__).parents[2] / "k8s"


def test_plain_manifest_carries_a_valid_config() -> None:
    service, doors = yaml.safe_load_all((K8S / "rayservice.yaml").read_text())
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    config = ServeConfig.model_validate(application["args"])
    assert application["import_path"] == "cluster.app:build"
    ports = {port["name"]: port["port"] for port in doors["spec"]["ports"]}
    assert ports == {"http": config.http_port, "grpc": config.router.grpc_port}
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert serve["http_options"]["port"] == config.proxy_port
    for group in (cluster["headGroupSpec"], *groups.values()):      # KubeRay's probes ask the proxy at this port
        (container,) = group["template"]["spec"]["containers"]
        named = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert named["serve"] == config.proxy_port
    for pool in config.pools:
        group = groups[pool.name]
        assert group["replicas"] == pool.replicas
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == pool.resources


def test_chart_values_carry_a_valid_config() -> None:
    values = yaml.safe_load((K8S / "chart/values.yaml").read_text())
    config = ServeConfig.model_validate(values["config"])
    assert {pool.name for pool in config.pools} == set(values["pools"])
    assert not any(pool.resources for pool in config.pools), "the chart sets them"
