"""`moesaic placement show | apply | history`: which shard holds which experts, and changing it while requests run."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.reaching import Address, Application, StateDir, reached
from cluster.cli.surroundings import console
from serving.errors import NotReadyError

placement_app = typer.Typer(no_args_is_help=True, help="Which shard holds which experts; change it while requests run.")

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object")]
_POLL_S = 0.2


@placement_app.command()
def show(application: Application = None, as_json: AsJson = False, address: Address = None,
         state_dir: StateDir = None) -> None:
    """Show the placement that runs, what was planned for it, and each member's share of the requests."""
    from cluster.cli.placement_view import placement_json, placement_view

    with reached(application, state_dir, address) as client:
        found = client.placement()
    if as_json:
        typer.echo(placement_json(found))
    else:
        console.print(placement_view(found))


@placement_app.command()
def history(application: Application = None, as_json: AsJson = False, address: Address = None,
         state_dir: StateDir = None) -> None:
    """Show the changes of this epoch, the latest last."""
    from cluster.cli.placement_view import history_content, history_view

    with reached(application, state_dir, address) as client:
        changes = client.placement().epoch.changes
    if as_json:
        typer.echo(json.dumps(history_content(changes)))
    else:
        console.print(history_view(changes))


@placement_app.command()
def apply(file: Annotated[Path | None, typer.Argument(
              help="JSON as `show --json` prints it; without it the best placement for the counted load")] = None,
          operation_id: Annotated[str | None, typer.Option(
              help="Whoever repeats a call with the same id gets the same change; default: a new one")] = None,
          why: Annotated[str, typer.Option(help="Noted in the history")] = "asked for",
          timeout_s: Annotated[float, typer.Option(min=0, help="How long to wait for it; 0: not at all")] = 600.0,
          application: Application = None, address: Address = None, state_dir: StateDir = None) -> None:
    """Change the placement between two steps; no request notices. Exit code 1 when the change failed, 2 when it runs
    still."""
    from cluster.cli.placement_view import history_view, read_placement
    from cluster.coordinator.client import CoordinatorUnavailableError
    from cluster.coordinator.placement_change import find

    operation_id = operation_id or f"cli-{secrets.token_hex(4)}"
    with reached(application, state_dir, address) as client:
        placement = read_placement(file, client.placement().epoch) if file is not None else None
        change = client.change_placement(operation_id, why, placement)
        until_s = time.monotonic() + timeout_s
        while change.state == "running" and time.monotonic() < until_s:
            time.sleep(_POLL_S)
            with contextlib.suppress(CoordinatorUnavailableError, NotReadyError):
                # A coordinator that has restarted may not have heard of it: the same call begins it anew.
                change = (find(client.placement().epoch, operation_id)
                          or client.change_placement(operation_id, why, placement))
    console.print(history_view((change,)))
    if change.state == "running":
        console.print(f"not done after {timeout_s:g} s; `moesaic placement history` tells how it ends")
    raise typer.Exit({"done": 0, "failed": 1, "running": 2}[change.state])
