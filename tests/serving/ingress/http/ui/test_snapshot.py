"""What a page gets."""

from __future__ import annotations

import json
from dataclasses import replace

from serving.ingress.http.ui.snapshot import MAX_TEXT, short_text
from tests.serving.ingress.http.ui.snapshots import a_snapshot


def test_each_part_is_one_line_of_json_that_changes_only_with_it() -> None:
    snapshot = a_snapshot()
    events = snapshot.events()
    assert list(events) == ["group", "holders", "load", "requests"]
    assert all(b"\n" not in content for content in events.values())
    assert json.loads(events["group"])["members"][2]["experts_over_profile"] == 1.9
    other = replace(snapshot, requests=a_snapshot(num_tokens_per_s=7.0).requests).events()
    assert {name for name in events if events[name] != other[name]} == {"requests"}
    assert replace(snapshot, holders=None, load=None).events()["holders"] == b"null"


def test_long_texts_are_cut() -> None:
    assert short_text("a" * MAX_TEXT) == "a" * MAX_TEXT
    assert short_text("a" * 5000) == "a" * (MAX_TEXT - 1) + "…"
