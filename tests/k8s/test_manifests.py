"""The configs that the manifests carry are ones that `moesaic up` would take."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from serving.config import ServeConfig

K8S = Path(__file__).parents[2] / "k8s"


def test_plain_manifest_carries_a_valid_config() -> None:
    service, grpc_service = yaml.safe_load_all((K8S / "rayservice.yaml").read_text())
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    config = ServeConfig.model_validate(application["args"])
    assert application["import_path"] == "cluster.app:build"
    assert grpc_service["spec"]["ports"][0]["port"] == config.router.grpc_port
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    for pool in config.pools:
        group = groups[pool.name]
        assert group["replicas"] == pool.replicas
        assert json.loads(json.loads(group["rayStartParams"]["resources"])) == pool.resources


def test_chart_values_carry_a_valid_config() -> None:
    values = yaml.safe_load((K8S / "chart/values.yaml").read_text())
    config = ServeConfig.model_validate(values["config"])
    assert {pool.name for pool in config.pools} == set(values["pools"])
    assert not any(pool.resources for pool in config.pools), "the chart sets them"
