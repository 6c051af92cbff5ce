"""Values that are misspelt or contradict each other are refused before anything is rendered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.make_base import PROFILES, files_of, read_values
from tests.k8s.rendering import CHART, Manifest, helm, one, render
from tests.k8s.rules import RULES, config_of, pods_of

DEFAULTS = CHART / "values.yaml"
FREE = {"labels", "annotations", "nodeSelector", "matchLabels", "requests", "limits", "accelerators"}


def objects_of(values: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield where each object is whose keys the schema knows."""
    if isinstance(values, dict):
        if not path or path[-1] not in FREE:
            yield path
        for key, value in values.items():
            yield from objects_of(value, (*path, key))
    elif isinstance(values, list):
        for index, value in enumerate(values):
            yield from objects_of(value, (*path, index))


def refused(values: Manifest) -> str:
    with pytest.raises(helm().HelmError) as found:
        render(values)
    return str(found.value)


@pytest.mark.parametrize("profile", [None, *PROFILES], ids=["default", *(profile.stem for profile in PROFILES)])
def test_a_typo_in_any_value_fails_the_rendering(profile: Path | None) -> None:
    values = read_values([DEFAULTS, *(files_of(profile) if profile else [])])
    paths = list(objects_of(values))
    for path in paths:
        place = values
        for key in path:
            place = place[key]
        place["typo"] = "x"
    told = re.findall(r"at '(.*)': additional properties 'typo' not allowed", refused(values))
    assert sorted(told) == sorted("".join(f"/{key}" for key in path) for path in paths)


def test_every_value_of_the_schema_stands_in_the_defaults() -> None:
    schema = yaml.safe_load((CHART.parent / "values.schema.yaml").read_text())
    values = yaml.safe_load(DEFAULTS.read_text())
    for name, part in schema["properties"].items():
        keys = set(part.get("properties", {})) if "$ref" not in part else set()
        assert name == "global" or name in values, name
        assert not keys or keys == set(values[name]), name


@pytest.mark.parametrize("values", [
    {"config": {"http_port": 0}}, {"config": {"local_nodes": []}},
    {"config": {"tls": {"certificate": "/a", "key": "/b"}}}, {"config": {"router": {"resources": {"x": 1}}}},
    {"config": {"pools": [{"name": "cpu", "resources": {"x": 1}}]}}, {"config": {"pools": []}},
    {"config": {"model": {"path": "m", "dtype": "int4"}}}, {"upgrade": {"type": "Rolling"}}, {"workers": []},
    {"workers": [{"pool": "cpu"}]}, {"head": {"resources": {}, "accelerator": "h100"}}])
def test_the_schema_refuses(values: Manifest) -> None:
    assert "schema" in refused(values)


@pytest.mark.parametrize(("values", "why"), [
    ({"workers": [{"pool": "gpu", "resources": {}}]}, "give each pool one entry of workers"),
    ({"workers": [{"pool": "cpu", "accelerator": "h100", "resources": {}}]}, "add --values k8s/accelerators/h100.yaml"),
    ({"accelerators": {"t4": {"dtypes": ["float16"]}},
      "workers": [{"pool": "cpu", "accelerator": "t4", "resources": {}}]}, "config.model.dtype is bfloat16"),
    ({"config": {"pools": [{"name": "routers"}]}, "workers": [{"pool": "routers", "resources": {}}]}, "take another"),
    ({"termination": {"graceSeconds": 90}}, "must be above drainSeconds"),
    ({"upgrade": {"type": "NewClusterWithIncrementalUpgrade"}}, "needs autoscaling.enabled"),
    ({"config": {"access": {"keys": True}}}, "set config.access.database"),
    ({"models": {"claimName": "", "download": {"enabled": True}}}, "needs models.claimName"),
    ({"models": {"download": {"enabled": True, "s3": {"source": "s3://b/m"}}}, "config": {"model": {"path": "hf://a/b"}}},
     "set it to /models/NAME")])
def test_contradictions_are_named_with_what_to_do(values: Manifest, why: str) -> None:
    assert why in refused(values)


def test_other_ports_are_followed_everywhere() -> None:
    manifests = render({"config": {"http_port": 8080, "proxy_port": 8200, "route_prefix": "/llm",
                                   "router": {"grpc_port": 9090, "replicas": 2}}})
    assert [fault for rule in RULES for fault in rule(manifests)] == []


def test_a_model_comes_from_a_bucket() -> None:
    manifests = render({"models": {"download": {"enabled": True, "s3": {
        "source": "s3://models/a", "endpointUrl": "http://minio:9000", "credentialsSecret": "bucket"}}}})
    assert [fault for rule in RULES for fault in rule(manifests)] == []
    container = one(manifests, "Job")["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["aws", "s3", "sync", "--no-progress", "s3://models/a", "/models/Qwen3-30B-A3B",
                                    "--endpoint-url", "http://minio:9000"]
    assert container["envFrom"] == [{"secretRef": {"name": "bucket"}}]
    assert container["image"].startswith("amazon/aws-cli:")


def test_images_are_pulled_before_on_the_nodes_that_will_need_them() -> None:
    profile = next(each for each in PROFILES if each.stem == "two-gpu-generations")
    manifests = render(read_values(files_of(profile)) | {"prePull": {"enabled": True}})
    assert [fault for rule in RULES for fault in rule(manifests)] == []
    pods = pods_of(manifests)
    for name in ("routers", "new", "old"):
        kept, pod = pods[f"moesaic-pull-{name}"]["spec"], pods[name]["spec"]
        assert kept["containers"][0]["image"] == pod["containers"][0]["image"]
        assert [kept.get(key) for key in ("nodeSelector", "tolerations")] == [
            pod.get(key) for key in ("nodeSelector", "tolerations")]


def test_a_digest_counts_before_a_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    for name, pod in pods_of(render({"image": {"digest": digest}})).items():
        assert pod["spec"]["containers"][0]["image"] == f"moesaic@{digest}", name


def test_services_can_be_held_to_one_ray_cluster() -> None:
    for name, selected in (("", None), ("moesaic-abcde", "moesaic-abcde")):
        services = [each for each in render({"service": {"rayCluster": name}}) if each["kind"] == "Service"]
        assert [each["spec"]["selector"].get("ray.io/cluster") for each in services] == [selected] * 2


def test_certificates_are_mounted_where_the_config_looks() -> None:
    """The doors' key is on routers only; the head has none."""
    manifests = render({"tls": {"doorsSecret": "doors", "clusterSecret": "links"}, "monitoring": {"enabled": True}})
    assert [fault for rule in RULES for fault in rule(manifests)] == []
    config, pods = config_of(manifests), pods_of(manifests)
    assert config.tls is not None and config.cluster_tls is not None
    folders = {str(Path(files.certificate).parent): secret
               for files, secret in ((config.tls, "doors"), (config.cluster_tls, "links"))}
    for name, expected in (("routers", folders), ("cpu", {"/etc/moesaic/cluster": "links"}), ("head", {})):
        spec = pods[name]["spec"]
        secrets = {volume["name"]: volume["secret"] for volume in spec["volumes"] if "secret" in volume}
        mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]
                  if mount["name"] in secrets}
        assert {path: secrets[mount["name"]]["secretName"] for path, mount in mounts.items()} == expected
        assert all(mount["readOnly"] and "subPath" not in mount for mount in mounts.values())
    ports = [port for each in manifests if each["kind"] == "Service" for port in each["spec"]["ports"]]
    assert {port["appProtocol"] for port in ports} == {"https"}
    (endpoint,) = one(manifests, "PodMonitor", "moesaic-routers")["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
