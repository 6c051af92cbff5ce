"""`moesaic plan --trace --html`: one file that needs no other."""

from __future__ import annotations

import base64
import io

from jinja2 import Environment, PackageLoader
from rich.console import Console

from cluster.whatif.cluster_file import cluster_name
from cluster.whatif.trace.trace_answer import TraceAnswer
from cluster.whatif.trace.trace_pictures import trace_png
from cluster.whatif.trace.trace_text import trace_view

_WIDTH = 110        # columns of the text on the page


def trace_page(answer: TraceAnswer) -> str:
    """Render the HTML, by the template of the plan's page."""
    environment = Environment(loader=PackageLoader("cluster.whatif"), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True)
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
    with console.capture() as captured:
        console.print(trace_view(answer), highlight=False)
    picture = base64.b64encode(trace_png(answer)).decode()
    return environment.get_template("plan.html").render(
        title=f"{answer.question.model_name} on {cluster_name(answer.question.cluster)}, a trace of requests",
        figures=answer.question.figures, text=captured.get(), sources=[], layers=[], members=[],
        pictures=[("replicas, backlog, requests in time", picture)])
