from __future__ import annotations

from pathlib import Path

import pytest

from model.memory import PAIR_BYTES
from model.transport import library
from model.transport.library import TransportLibraryError, load_library


def test_a_library_that_is_not_there_tells_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "transport.so")
    with pytest.raises(TransportLibraryError, match="python setup.py build_generated"):
        load_library()


def test_the_planner_counts_what_a_pair_shares() -> None:
    assert load_library().transport_segment_bytes() == PAIR_BYTES
