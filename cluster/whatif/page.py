"""`moesaic plan --html`: one file that needs no other, with pictures of who holds which experts and of each memory."""

from __future__ import annotations

import io

from jinja2 import Environment, PackageLoader
from rich.console import Console

from cluster.whatif.answer import PlanAnswer
from cluster.whatif.cluster_file import cluster_name, figures_of
from cluster.whatif.expert_ranges import expert_id_ranges
from cluster.whatif.pictures import expert_map_png, memory_bars_png
from cluster.whatif.text import plan_view

_WIDTH = 110        # columns of the text on the page


def plan_page(answer: PlanAnswer) -> str:
    """Render the HTML."""
    loader = PackageLoader("cluster.whatif")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pictures = [("which device holds which expert", expert_map_png(answer, answer.plan)),
                ("memory of each device", memory_bars_png(answer, answer.plan))] if answer.plan else []
    return environment.get_template("plan.html").render(
        title=f"{answer.question.model_name} on {cluster_name(answer.question.cluster)}",
        figures=answer.question.figures, text=_text(answer), pictures=pictures, sources=_sources(answer),
        layers=_layers(answer), members=[member.name for member in answer.members])


def _sources(answer: PlanAnswer) -> list[tuple[str, str, str]]:
    """Return (kind of node, document, address) of the data-sheet figures."""
    return [(nodes.name, figures_of(nodes).source, figures_of(nodes).url) for nodes in answer.question.cluster.nodes
            if nodes.name not in answer.question.measured]


def _text(answer: PlanAnswer) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(plan_view(answer), highlight=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _layers(answer: PlanAnswer) -> list[list[str]]:
    """Return the ids of each member's experts, of each MoE layer."""
    if answer.plan is None:
        return []
    placement = answer.plan.placement
    return [[expert_id_ranges(placement.experts_of(layer, rank)) or "-" for rank in range(placement.num_members)]
            for layer in range(placement.num_layers)]
