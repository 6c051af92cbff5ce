"""The failover benchmark, in short: five members are killed, one after the other, and replaced, while streams go on."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.failover import is_right, measure, parse_options
from tests.benchmarks.group_checkpoint import LOAD, tiny


@pytest.mark.parametrize(("copies", "kills"), [(2, 3), (1, 2)])
def test_no_stream_fails_or_is_wrong_when_members_are_killed(tmp_path: Path, copies: int, kills: int) -> None:
    options = parse_options(["--model", tiny(tmp_path), "--kills", str(kills), "--copies", str(copies),
                             "--speed", "0.3"])
    found = asyncio.run(measure(options, LOAD, 5, tmp_path))
    assert is_right(found), found
    assert found["kills"] == kills and found["answers"] and found["different_answers"] == LOAD.num_streams
