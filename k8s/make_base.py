"""Writes k8s/kustomize/base/moesaic.yaml: the chart with its own values, for those who use kustomize."""

from __future__ import annotations

from pathlib import Path

from helm_python import Chart

K8S = Path(__file__).parent


def make_base() -> str:
    rendered = Chart.load(K8S / "chart").render({}, name="moesaic", namespace="serving", is_install=True)
    texts = [text.strip().removeprefix("---").strip() for name, text in sorted(rendered.items()) if text.strip()]
    return "---\n".join(text + "\n" for text in texts if text)


if __name__ == "__main__":
    (K8S / "kustomize" / "base" / "moesaic.yaml").write_text(make_base(), encoding="utf-8")
