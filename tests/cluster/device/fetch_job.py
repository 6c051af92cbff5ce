"""One process of a node that looks for its checkpoint. Argument: JSON; writes JSON, one line."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from cluster.device import checkpoint_fetch
from cluster.device.model_store import locate_checkpoint
from model.errors import CheckpointError
from serving.config import ModelConfig


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _content(file: Path) -> str:
    return file.read_text() if file.stat().st_size < 10_000 else hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    job: dict[str, Any] = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO)
    waits: list[float] = []
    if job["fake_sleep"]:
        time.sleep = waits.append
    if job["fake_sleep"] and job["path"].startswith("modelscope"):      # its waits are not by time.sleep
        import modelscope_hub._download
        modelscope_hub._download.DOWNLOAD_INTEGRITY_RETRY_BACKOFF = 0.0
    checkpoint_fetch._REPORT_S = job["report_s"]
    config = ModelConfig(path=job["path"], revision=job["revision"])

    def report(line: str) -> None:
        _say({"report": line})

    answer: dict[str, Any] = {"waits": waits}
    try:
        for part in job["parts"]:
            folder = locate_checkpoint(config, part, report)
            answer["folder"] = str(folder)
            answer["files"] = {str(file.relative_to(folder)): _content(file) for file in sorted(folder.rglob("*"))
                               if file.is_file()}
    except CheckpointError as error:
        answer |= {"error": str(error), "trace": traceback.format_exc()}
    _say(answer)


if __name__ == "__main__":
    main()
