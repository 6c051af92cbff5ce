"""The pictures of a simulated trace: replicas, backlog and SLO attainment over time. W windows of time"""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cluster.whatif.trace.trace_answer import NamedRun, TraceAnswer
from model.arrays import FloatArray

_DPI = 110
_NUM_WINDOWS = 60           # in which attainment is averaged
_OURS, _STOCK, _FIXED = "#4c72b0", "#dd8452", "#7f7f7f"


def trace_png(answer: TraceAnswer) -> bytes:
    figure = Figure(figsize=(10, 8), dpi=_DPI, layout="constrained")
    replicas, backlog, attained = figure.subplots(3, 1, sharex=True)
    shown = [(answer.ours, _OURS), (answer.stock[0], _STOCK)]
    if answer.smallest is not None:
        shown.append((answer.smallest, _FIXED))
    for one, colour in shown:
        times = [sample.at_s for sample in one.run.samples]
        replicas.step(times, [sum(sample.ready) for sample in one.run.samples], where="post", color=colour,
                      label=one.name, linewidth=1)
        backlog.plot(times, [sample.work.num_waiting_tokens for sample in one.run.samples], color=colour, linewidth=1)
        _draw_attained(attained, answer, one, colour)
    replicas.set_ylabel("replicas that serve")
    backlog.set_ylabel("prompt tokens that wait")
    attained.set_ylabel("part in time")
    attained.set_xlabel("seconds; attainment by time of arrival")
    attained.set_ylim(-0.02, 1.02)
    for axes in (replicas, backlog, attained):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(shown), frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_attained(axes: Axes, answer: TraceAnswer, one: NamedRun, colour: str) -> None:
    edges_W = np.linspace(0.0, answer.trace[-1].at_s + 1e-9, _NUM_WINDOWS + 1)
    rules = answer.model.rules
    in_time = np.array([served.ttft_s <= rules.ttft_slo_s and served.itl_s <= rules.itl_slo_s
                        for served in one.run.served], dtype=np.float64)
    window = np.searchsorted(edges_W, [served.request.at_s for served in one.run.served], side="right") - 1
    num_W: FloatArray = np.bincount(window, minlength=_NUM_WINDOWS).astype(np.float64)
    part_W = np.bincount(window, weights=in_time, minlength=_NUM_WINDOWS) / np.where(num_W, num_W, np.nan)
    axes.plot((edges_W[:-1] + edges_W[1:]) / 2, part_W, ".", color=colour)
