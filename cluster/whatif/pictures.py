"""Pictures of a placement. L layers, E experts, M members, S parts of a cell (one for each copy)."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cluster.planner.placement_plan import PlacementPlan
from cluster.whatif.answer import PlanAnswer
from cluster.whatif.text import memory_parts

Colour = tuple[float, float, float, float]
_HUES = ("Blues", "Oranges", "Greens", "Purples", "Reds", "Greys")      # one for each kind of node
_PART_COLOURS = {"process": "#7f7f7f", "shared": "#4c72b0", "experts": "#dd8452", "KV cache": "#55a868",
                 "states": "#8172b3", "buffers": "#c9b458", "free": "#eeeeee"}
_DPI = 110


def expert_map_png(answer: PlanAnswer, plan: PlacementPlan) -> str:
    """Draw MoE layers x experts, coloured by the holder. Base64 of a PNG."""
    holders, names = plan.placement.holders, [member.name for member in answer.members]
    num_parts = max(len(ranks) for layer in holders for ranks in layer)
    cells_LX = np.array([[ranks[part * len(ranks) // num_parts] for ranks in layer for part in range(num_parts)]
                         for layer in holders])
    num_layers, num_experts = len(holders), len(holders[0])
    colours = member_colours(answer)
    figure = Figure(figsize=(10, min(6.5, 2.2 + num_layers * 0.06)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(cells_LX, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5, aspect="auto",
                interpolation="nearest", extent=(-0.5, num_experts - 0.5, num_layers - 0.5, -0.5))
    axes.set_xlabel("expert" if num_parts == 1 else "expert (a cell is divided among the devices that hold a copy)")
    axes.set_ylabel("MoE layer")
    figure.legend(handles=[Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)],
                  loc="outside right upper", fontsize=8, frameon=False, ncols=1 + (len(names) - 1) // 24)
    return _png(figure)


def memory_bars_png(answer: PlanAnswer, plan: PlacementPlan) -> str:
    """Draw every device's budget, by what it is for. Base64 of a PNG."""
    names = [member.name for member in answer.members]
    figure = Figure(figsize=(10, 1.4 + 0.28 * len(names)), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    left_M = np.zeros(len(names))
    parts = memory_parts(plan)
    for name, field in parts:
        bytes_M = np.array([getattr(member.memory, field) for member in plan.members], dtype=np.float64)
        axes.barh(names, bytes_M / 1e9, left=left_M / 1e9, color=_PART_COLOURS[name], label=name, edgecolor="white",
                  linewidth=0.5)
        left_M += bytes_M
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02 * float(left_M.max()) / 1e9)
    axes.set_xlabel("GB of the memory budget")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    figure.legend(loc="outside upper center", ncols=len(parts), fontsize=8, frameon=False)
    return _png(figure)


def member_colours(answer: PlanAnswer) -> list[Colour]:
    """Choose a hue for each kind of node, a shade of it for each device."""
    kinds = [nodes.name for nodes in answer.question.cluster.nodes]
    colours: list[Colour] = []
    for index, kind in enumerate(kinds):
        shades = colormaps[_HUES[index % len(_HUES)]]
        num_devices = sum(member.pool == kind for member in answer.members)
        colours += [shades(float(at)) for at in np.linspace(0.9, 0.3, num_devices)]
    return colours


def _png(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return base64.b64encode(content.getvalue()).decode()
