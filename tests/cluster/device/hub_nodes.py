"""Processes of one node that look for a checkpoint at a local hub, with the hubs' real libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.device.hub_server import COMMIT, FakeHub
from tests.deadlines import PATIENCE_S

ROOT = Path(__file__).parent.parent.parent.parent
INDEX = "model.safetensors.index.json"
CHECKPOINT = {
    "config.json": b'{"model_type": "tiny"}', "tokenizer.json": b'{"version": "1.0"}',
    INDEX: json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode(),
    "model-1.safetensors": b"1" * 5000, "model-2.safetensors": b"2" * 3000}
NOT_NEEDED = {"pytorch_model.bin": b"b" * 9000, "consolidated.safetensors": b"c" * 9000, "README.md": b"read",
              "onnx/model.onnx": b"o" * 900, "original/config.json": b"{}",
              "../outside.json": b"{}", "/tmp/x.json": b"{}"}


@dataclass
class Fetched:
    """Holds what a process has answered, and all that it wrote."""

    answer: dict[str, Any]
    output: str

    @property
    def files(self) -> set[str]:
        return set(self.answer["files"])

    @property
    def folder(self) -> Path:
        return Path(self.answer["folder"])

    @property
    def error(self) -> str:
        return str(self.answer.get("error", ""))


@dataclass
class Node:
    """A machine with a cache."""

    home: Path
    hub: FakeHub
    scheme: str
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, parts: Sequence[str] = ("facts", "all"), *, name: str = "owner/model", revision: str | None = None,
              fake_sleep: bool = True, report_s: float = 5.0, **environment: str) -> subprocess.Popen[str]:
        job = {"path": f"{self.scheme}://{name}", "revision": revision, "parts": parts, "fake_sleep": fake_sleep,
               "report_s": report_s}
        kept = {key: value for key, value in os.environ.items()
                if not key.startswith(("HF_", "MODELSCOPE_", "XDG_")) and not key.lower().endswith("_proxy")}
        own = {"HOME": str(self.home), "HF_ENDPOINT": self.hub.url, "MODELSCOPE_ENDPOINT": self.hub.url,
               "HF_HUB_DISABLE_TELEMETRY": "1", "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}
        return subprocess.Popen([sys.executable, "-m", "tests.cluster.device.fetch_job", json.dumps(job)], cwd=ROOT,
                                env=kept | own | self.environment | environment, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE)

    def fetch(self, parts: Sequence[str] = ("facts", "all"), **options: Any) -> Fetched:
        return finish(self.start(parts, **options))


def finish(process: subprocess.Popen[str]) -> Fetched:
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err
    return Fetched(json.loads(out.splitlines()[-1]), out + err)


def a_hub() -> FakeHub:
    return FakeHub({COMMIT: CHECKPOINT | NOT_NEEDED})
