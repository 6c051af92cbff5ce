"""Every profile renders, and what it renders keeps every rule. What a cluster does with it is not shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from k8s import make_base
from k8s.make_base import PROFILES, files_of
from tests.k8s.rendering import ROOT, helm, one, rendered
from tests.k8s.rules import RULES, config_of, groups_of

SETS = [None, *PROFILES]
NAMES = ["default", *(profile.stem for profile in PROFILES)]


@pytest.mark.parametrize("profile", SETS, ids=NAMES)
def test_a_profile_keeps_the_rules(profile: Path | None) -> None:
    manifests = rendered(profile)
    faults = [f"{rule.__name__}: {fault}" for rule in RULES for fault in rule(manifests)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("profile", PROFILES, ids=NAMES[1:])
def test_the_command_of_a_profile_names_it_last(profile: Path) -> None:
    assert files_of(profile)[-1] == profile and all(path.is_file() for path in files_of(profile))


@pytest.mark.parametrize("profile", SETS, ids=NAMES)
def test_worker_groups_are_the_pools_in_their_order_behind_the_routers(profile: Path | None) -> None:
    manifests = rendered(profile)
    assert list(groups_of(manifests)) == ["head", "routers", *(pool.name for pool in config_of(manifests).pools)]


def test_what_is_kept_of_the_rendering_is_what_the_chart_renders() -> None:
    helm()
    made = make_base.make_all()
    kept = {path: path.read_text() for folder in {path.parent for path in made} for path in folder.glob("*.yaml")
            if path.name != "kustomization.yaml"}
    assert kept == made, "run .venv/bin/python k8s/make_base.py, and look at what changes"
    assert list(yaml.safe_load_all(kept[ROOT / "k8s/kustomize/base/moesaic.yaml"])) == rendered(None)


def test_two_gpu_generations_each_get_their_own_nodes_and_share_the_dtype_of_the_older() -> None:
    groups = groups_of(rendered(ROOT / "k8s/profiles/two-gpu-generations.yaml"))
    new, old = (groups[name]["template"]["spec"] for name in ("new", "old"))
    assert (new["nodeSelector"], old["nodeSelector"]) == (
        {"nvidia.com/gpu.family": "hopper"}, {"nvidia.com/gpu.family": "volta"})
    for spec in (new, old):
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert spec["containers"][0]["image"] == "moesaic:0.1.0-cuda" and spec["runtimeClassName"] == "nvidia"
    assert new["containers"][0]["securityContext"]["capabilities"] == {"add": ["IPC_LOCK"], "drop": ["ALL"]}


def test_the_profile_for_failures_names_its_secrets() -> None:
    manifests = rendered(ROOT / "k8s/profiles/ha.yaml")
    cluster = one(manifests, "RayService")["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "moesaic-ray-token"}
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "moesaic-redis"
    monitor = one(manifests, "PodMonitor", "moesaic-routers")["spec"]["podMetricsEndpoints"][0]
    assert monitor["authorization"] == {"credentials": {"name": "moesaic-status-key", "key": "key"}}


def test_the_collectors_headers_go_to_those_who_send_spans() -> None:
    manifests = rendered(ROOT / "k8s/profiles/ha.yaml")
    tracing = config_of(manifests).tracing
    assert tracing is not None and tracing.sample_ratio == 0.05
    for name, group in groups_of(manifests).items():
        env = {each["name"]: each.get("valueFrom") for each in group["template"]["spec"]["containers"][0]["env"]}
        secret = {"secretKeyRef": {"name": "moesaic-collector", "key": "headers"}}
        assert env.get("OTEL_EXPORTER_OTLP_HEADERS") == (None if name == "head" else secret), name


def test_a_mirror_and_its_pull_secret_are_used_by_every_pod() -> None:
    for name, group in groups_of(rendered(ROOT / "k8s/profiles/air-gapped.yaml")).items():
        spec = group["template"]["spec"]
        assert spec["imagePullSecrets"] == [{"name": "registry-internal"}], name
        assert spec["containers"][0]["image"].startswith("registry.internal/ml/moesaic:"), name


def test_the_model_is_fetched_before_and_read_offline() -> None:
    manifests = rendered(ROOT / "k8s/profiles/cpu.yaml")
    job = one(manifests, "Job")["spec"]["template"]["spec"]["containers"][0]
    assert job["command"] == ["moesaic", "fetch", "hf://Qwen/Qwen3-30B-A3B", "--revision", "main"]
    for group in groups_of(manifests).values():
        env = {each["name"]: each.get("value") for each in group["template"]["spec"]["containers"][0]["env"]}
        assert env["HF_HUB_OFFLINE"] == "1" and env["HF_HOME"] == "/models/huggingface" and "HF_TOKEN" not in env
