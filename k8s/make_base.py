"""Writes what the chart renders to: kustomize/base/moesaic.yaml with its own values, for those who use kustomize, and
rendered/PROFILE.yaml for each profile, so that a change of the chart shows what it does.

Run it as `python k8s/make_base.py` after a change of the chart, a profile or an accelerator.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parent
PROFILES = sorted((K8S / "profiles").glob("*.yaml"))


def files_of(profile: Path) -> list[Path]:
    """Return the values files of the command in a profile's first line."""
    command = profile.read_text(encoding="utf-8").splitlines()[0]
    return [K8S.parent / name for name in re.findall(r"--values (\S+)", command)]


def read_values(paths: Sequence[Path]) -> dict[str, Any]:
    """Return values as `helm --values` merges several files: objects by key, everything else as a whole."""
    merged: dict[str, Any] = {}
    for path in paths:
        _merge(merged, yaml.safe_load(path.read_text(encoding="utf-8")))
    return merged


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def make_all() -> dict[Path, str]:
    """Return the content of every file that this writes."""
    profiles = {K8S / "rendered" / profile.name: render_text(read_values(files_of(profile))) for profile in PROFILES}
    return {K8S / "kustomize" / "base" / "moesaic.yaml": render_text({})} | profiles


def render_text(values: dict[str, Any]) -> str:
    from helm_python import Chart  # has no wheels for other machines, where tests read the functions above

    rendered = Chart.load(K8S / "chart").render(values, name="moesaic", namespace="serving", is_install=True)
    texts = [text.strip().removeprefix("---").strip() for name, text in sorted(rendered.items())
             if name.endswith(".yaml") and text.strip()]
    return "---\n".join(text + "\n" for text in texts if text)


if __name__ == "__main__":
    (K8S / "rendered").mkdir(exist_ok=True)
    for old in (K8S / "rendered").glob("*.yaml"):
        old.unlink()
    for path, text in make_all().items():
        path.write_text(text, encoding="utf-8")
