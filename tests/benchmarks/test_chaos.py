"""The chaos benchmark, in short: real processes are disturbed while streams go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.chaos import is_right, measure, parse_options
from tests.benchmarks.group_checkpoint import LOAD, tiny


def test_no_stream_fails_or_is_wrong_whatever_happens_to_the_group(tmp_path: Path) -> None:
    options = parse_options(["--model", tiny(tmp_path), "--minutes", "0.4", "--every", "2.5", "--calm-s", "0.5",
                             "--speed", "0.2"])
    found = asyncio.run(measure(options, LOAD, 5, tmp_path))
    assert is_right(found), found
    assert found["answers"] and len(found["faults"]) >= 4       # type: ignore[arg-type]   # of 8, on a busy machine
