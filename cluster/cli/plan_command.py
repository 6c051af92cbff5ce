"""The command `moesaic plan`: read, plan, show."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console

from cluster.cli.solver_output import solver_output_to_stderr
from cluster.whatif.answer import PlanAnswer, answer_question
from cluster.whatif.request import PlanRequest, read_question


def run_plan(request: PlanRequest, console: Console, as_json: bool, html: Path | None) -> bool:
    """Return True when the model fits. Progress goes to stderr, so that output can be piped."""
    question = read_question(request)
    with Console(stderr=True).status("planning") as status:
        with solver_output_to_stderr():
            answer = answer_question(question, lambda what: status.update(f"planning: {what}"))
        if html is not None:
            status.update("planning: picture")
            _write_page(answer, html)
    if as_json:
        from cluster.whatif.plan_json import plan_json

        typer.echo(plan_json(answer))
    else:
        from cluster.whatif.text import plan_view

        console.print(plan_view(answer), highlight=False)
        if html is not None:
            console.print(f"\npage: {html}", markup=False, highlight=False, soft_wrap=True)
    return answer.plan is not None


def run_trace(request: PlanRequest, trace: Path, console: Console, as_json: bool, html: Path | None,
              png: Path | None) -> None:
    """Simulate the autoscaler on a trace of requests."""
    from cluster.whatif.trace.trace_answer import answer_trace
    from cluster.whatif.trace.trace_file import read_trace
    from cluster.whatif.trace.trace_page import trace_page
    from cluster.whatif.trace.trace_pictures import trace_png
    from cluster.whatif.trace.trace_text import trace_json, trace_view

    question, requests = read_question(request), read_trace(trace)
    with Console(stderr=True).status("simulating") as status:
        answer = answer_trace(question, requests, lambda what: status.update(f"simulating: {what}"))
        if html is not None:
            _write(html, "--html", trace_page(answer).encode())
        if png is not None:
            _write(png, "--png", trace_png(answer))
    if as_json:
        typer.echo(trace_json(answer))
    else:
        console.print(trace_view(answer), highlight=False)


def _write_page(answer: PlanAnswer, path: Path) -> None:
    from cluster.whatif.page import plan_page

    _write(path, "--html", plan_page(answer).encode())


def _write(path: Path, option: str, content: bytes) -> None:
    from serving.config import ConfigError

    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}",
                          fix=f"give {option} a path that can be written") from error
