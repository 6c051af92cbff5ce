"""A picture of streams around a moment: every message of every stream over time, and tokens a second of all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.local_group.streams import Arrival

_DPI = 110
_BEFORE_S, _AFTER_S, _BIN_S = 1.0, 3.0, 0.05


def draw_tokens(arrivals: Sequence[Arrival], at_s: float, of_dead: Collection[str], path: Path) -> None:
    """Write a PNG. `of_dead`: the requests that a member computed which was killed at at_s."""
    shown = [arrival for arrival in arrivals if -_BEFORE_S <= arrival.at_s - at_s <= _AFTER_S]
    requests = sorted({arrival.request_id for arrival in shown}, key=lambda name: (name in of_dead, name))
    row_of = {request_id: row for row, request_id in enumerate(requests)}
    figure = Figure(figsize=(10, 6.5), dpi=_DPI, layout="constrained")
    streams, rate = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for is_dead, colour, label in ((False, "#4c72b0", "of survivors"), (True, "#dd8452", "of the dead member")):
        dots = [arrival for arrival in shown if (arrival.request_id in of_dead) == is_dead]
        streams.scatter([arrival.at_s - at_s for arrival in dots], [row_of[arrival.request_id] for arrival in dots],
                        s=3, color=colour, label=f"streams {label}", linewidths=0)
    streams.set_ylabel("streams, a dot for each token")
    streams.legend(loc="upper right", fontsize=8, markerscale=3)
    edges = np.arange(-_BEFORE_S, _AFTER_S + _BIN_S, _BIN_S)
    tokens, _ = np.histogram([arrival.at_s - at_s for arrival in shown], edges,
                             weights=[arrival.num_tokens for arrival in shown])
    rate.step(edges[:-1], tokens / _BIN_S, where="post", color="#55a868")
    rate.set_ylabel("tokens/s")
    rate.set_xlabel("seconds after the kill")
    for axes in (streams, rate):
        axes.axvline(0.0, color="#c44e52", linewidth=1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")
