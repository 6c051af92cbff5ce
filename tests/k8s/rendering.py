"""Renders the chart with the Helm library in the dev dependency helm-python-sdk, once for each profile."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s.make_base import files_of, read_values

ROOT = Path(__file__).parents[2]
CHART = ROOT / "k8s" / "chart"
Manifest = dict[str, Any]


def render(values: Manifest) -> list[Manifest]:
    """Return the manifests. Raises helm_python.HelmError."""
    rendered = _chart().render(values, name="moesaic", namespace="serving", is_install=True)
    texts = [text for name, text in sorted(rendered.items()) if name.endswith(".yaml")]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]


def helm() -> Any:
    return pytest.importorskip("helm_python", reason="Helm's library has wheels for Linux on x86-64 only")


@cache
def _chart() -> Any:
    return helm().Chart.load(CHART)


@cache
def _rendered(profile: Path | None) -> list[Manifest]:
    return render(read_values(files_of(profile)) if profile else {})


def rendered(profile: Path | None) -> list[Manifest]:
    """Return the manifests of a profile, or of the default values: a copy of one's own."""
    return copy.deepcopy(_rendered(profile))


def one(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    found = [each for each in manifests if each["kind"] == kind and name in (None, each["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} manifests are {kind} {name or ''}"
    return found[0]
