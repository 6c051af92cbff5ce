"""Defines the command `moesaic`. Each command imports what it needs when it runs, so that each starts fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cluster.cli.keys_commands import Database, keys_app
from cluster.cli.placement_commands import placement_app
from cluster.cli.reaching import Address, Application, StateDir, reached
from cluster.cli.surroundings import console, notes, ready_process
from cluster.device.state_dir import default_state_dir, with_database
from cluster.launch.door_trust import split_address
from cluster.launch.interruption import ENDING_SIGNALS, Interrupted, interruptible
from cluster.launch.state_file import (
    NoClusterError,
    RunningCluster,
    read_state,
    require_alive,
)
from cluster.launch.supervision import start_supervised
from model.errors import ModelError
from serving.config import AccessConfig, ConfigError, ModelConfig, check_options, load_config
from serving.errors import ServingError
from serving.tenants.usage_by import UsageBy, UsageFormat

DEMO_CONFIG = Path(__file__).parents[2] / "examples" / "demo.yaml"
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Serve one Mixture-of-Experts language model over a Ray cluster.")
app.add_typer(placement_app, name="placement")
app.add_typer(keys_app, name="keys")

ConfigPath = Annotated[Path, typer.Argument(help="YAML config, for example examples/demo.yaml")]


@app.command()
def up(config: ConfigPath, state_dir: StateDir = None) -> None:
    """Start the local nodes of CONFIG, if it has any, and serve the model. Returns when it answers."""
    directory = state_dir or default_state_dir()
    loaded = with_database(load_config(config), directory)
    starter_pid = start_supervised(directory, loaded.application)

    from cluster.cli.start_display import StartDisplay
    from cluster.launch.bring_up import BringUp

    display = StartDisplay(console, loaded)
    with display, BringUp(loaded, directory, display, starter_pid).running() as running:
        display.close()
        console.print(f"{running.model} answers at {running.http_url}/v1 and over gRPC at {running.grpc_address}\n"
                      "next: moesaic chat, moesaic status, moesaic down", markup=False, highlight=False, soft_wrap=True)


@app.command()
def status(application: Application = None, as_json: Annotated[bool, typer.Option("--json")] = False,
           experts: Annotated[bool, typer.Option("--experts", help="Also loads of experts, work of members")] = False,
           autoscaler: Annotated[bool, typer.Option("--autoscaler", help="Also what it wants, and why")] = False,
           address: Address = None, state_dir: StateDir = None) -> None:
    """Show nodes, shards, experts and memory, load and health. Exit code 1 when neither healthy nor asleep."""
    from cluster.cli.autoscaler_view import autoscaler_view
    from cluster.cli.placement_view import experts_view
    from cluster.cli.status_table import StatusView, status_json

    with reached(application, state_dir, address) as client:
        found = client.status()
        placement = client.placement() if experts else None
    if as_json:
        typer.echo(status_json(found, placement))
    else:
        console.print(StatusView(found))
        if placement is not None:
            console.print(experts_view(placement))
        if autoscaler:
            console.print(autoscaler_view(found), markup=False, highlight=False)
    raise typer.Exit(0 if found.is_ready or found.view.is_asleep else 1)


@app.command()
def drain(target: Annotated[str, typer.Argument(help="A shard's id or a node's name; a wrong one lists all")],
          operation_id: Annotated[str | None, typer.Option(
              help="Whoever repeats a call with the same id gets the same operation; default: a new one")] = None,
          wait_s: Annotated[float, typer.Option("--wait", min=0, help="Wait so long for its end")] = 0.0,
          application: Application = None, address: Address = None, state_dir: StateDir = None) -> None:
    """Let a shard, or all shards of a node, leave without loss: no new requests, experts move to others. Exit code 0
    when they may be stopped, 2 while it goes on."""
    from cluster.cli.drain_command import drained

    with reached(application, state_dir, address) as client:
        found = drained(client, target, operation_id, wait_s)
    console.print(f"{found.operation_id}: {', '.join(found.shard_ids)}: {found.detail}", markup=False, soft_wrap=True)
    raise typer.Exit(0 if found.is_done else 2)


@app.command()
def scale(pool: Annotated[str, typer.Argument(help="A pool of the config")],
          num: Annotated[int, typer.Argument(min=0, metavar="N", help="Shards from now on: min_ to max_replicas")],
          shard: Annotated[str | None, typer.Option(help="Who is to leave  [default: who can best be missed]")] = None,
          wait_s: Annotated[float, typer.Option("--wait", min=0, help="Wait so long for its end")] = 0.0,
          application: Application = None, address: Address = None, state_dir: StateDir = None) -> None:
    """Let a pool have N shards; those that are to go leave without loss first. Exit code 0 when it has them, 2 while it
    goes on. Repeated, it is the same operation."""
    from cluster.cli.scale_command import scaled

    with reached(application, state_dir, address) as client:
        found = scaled(client, pool, num, shard, wait_s)
    console.print(found.detail, markup=False, soft_wrap=True)
    raise typer.Exit(0 if found.is_done else 2)


@app.command()
def chat(question: Annotated[str | None, typer.Argument(help="Ask this and end; without it, a conversation")] = None,
         grpc: Annotated[bool, typer.Option("--grpc", help="Over gRPC instead of HTTP")] = False,
         address: Annotated[str | None, typer.Option(
             help="host:port of a service started elsewhere; https:// before it where it speaks TLS")] = None,
         api_key: Annotated[str | None, typer.Option(envvar="MOESAIC_API_KEY")] = None,
         max_tokens: Annotated[int | None, typer.Option(min=1, help="Of one answer  [default: 512]")] = None,
         temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
         application: Application = None, state_dir: StateDir = None) -> None:
    """Talk to the running service; answers are streamed."""
    from cluster.cli.chat import GrpcChatClient, HttpChatClient, Limits, Message
    from cluster.cli.conversation import converse, print_answer, sendable

    if address is not None:
        address, trust = split_address(address)
    else:
        running = read_state(state_dir or default_state_dir(), application)
        require_alive(running)
        address, trust = running.grpc_address if grpc else running.http_address, running.trust
        if not address:
            raise NoClusterError(f"application {running.application!r} is still starting",
                                 fix="wait until `moesaic up` says where it answers")
    client = (GrpcChatClient if grpc else HttpChatClient)(address, api_key, trust)
    limits = Limits(max_tokens, temperature)
    if question is not None:
        answered = print_answer(console, client, [Message("user", sendable(question))], limits)
        notes.print(answered.summary(), style="dim", markup=False, highlight=False, soft_wrap=True)
    else:
        converse(console, notes, client, limits)


@app.command()
def down(application: Application = None, state_dir: StateDir = None) -> None:
    """Stop the application, and the local nodes that were started for it."""
    from cluster.launch.bring_up import take_down

    directory = state_dir or default_state_dir()
    running: RunningCluster = read_state(directory, application)
    num_stopped = take_down(running, directory)
    how = f" ({num_stopped} processes)" if num_stopped else ": its processes had ended already"
    console.print(f"{running.application} is stopped" + (how if running.processes else ""), highlight=False)


@app.command()
def usage(by: Annotated[UsageBy, typer.Option(help="Add up so")] = UsageBy.TENANT,
          since: Annotated[str | None, typer.Option(help="First day, as 2026-11-01, UTC  [default: all]")] = None,
          until: Annotated[str | None, typer.Option(help="Last day  [default: today]")] = None,
          form: Annotated[UsageFormat, typer.Option("--format")] = UsageFormat.TABLE,
          config: Annotated[Path | None, typer.Option(help="Its access.database, and access.prices for a bill")] = None,
          database: Database = None, state_dir: StateDir = None) -> None:
    """Show what the owners of keys have used, and what it costs."""
    from cluster.cli.usage_command import print_usage, usage_between

    access = load_config(config).access if config is not None else AccessConfig()
    found = usage_between(database or access.database, state_dir or default_state_dir(), by, since, until)
    print_usage(console, found, by, access.prices, form)


@app.command()
def doctor(config: Annotated[Path | None, typer.Argument(help="Check for this config too")] = None) -> None:
    """Check this machine before the first start. Exit code 1 when something would not work."""
    from cluster.cli.doctor import Verdict, run_checks

    loaded = load_config(config) if config is not None else None
    colours = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "red"}
    worst = Verdict.OK
    for check in run_checks(loaded):
        row = Table.grid(padding=(0, 1))
        row.add_row(f"[{colours[check.verdict]}]{check.verdict:<4}[/]", f"{check.name:<16}", check.found)
        console.print(row)
        if check.fix:
            console.print(f"       -> {check.fix}", markup=False)
        worst = Verdict.FAIL if Verdict.FAIL in (worst, check.verdict) else worst
    raise typer.Exit(1 if worst is Verdict.FAIL else 0)


@app.command()
def plan(model: Annotated[Path, typer.Option(help="Folder with config.json, that file, or a Moesaic config (YAML)")],
         cluster: Annotated[Path, typer.Option(help="Cluster file, for example one of examples/clusters")],
         batch: Annotated[int | None, typer.Option(min=1, help="Sequences that decode at once  [default: 64]")] = None,
         context: Annotated[int | None, typer.Option(min=1, help="Tokens of each  [default: 4096]")] = None,
         dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32")] = None,
         min_copies: Annotated[int | None, typer.Option(help="Devices that every expert is on: 1 or 2")] = None,
         max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a device's step; sizes buffers")] = None,
         expert_load: Annotated[Path | None, typer.Option(help="JSON array [MoE layers][experts] of loads")] = None,
         even: Annotated[bool, typer.Option("--even", help="Place the same on every device")] = False,
         fast: Annotated[bool, typer.Option("--fast", help="Greedy instead of exact")] = False,
         as_json: Annotated[bool, typer.Option("--json")] = False,
         html: Annotated[Path | None, typer.Option(help="Also write a page with pictures here")] = None,
         trace: Annotated[Path | None, typer.Option(help="CSV of requests: simulate the autoscaler on it")] = None,
         png: Annotated[Path | None, typer.Option(help="With --trace: also write its picture here")] = None) -> None:
    """Would the model fit on a cluster, where would its bytes be, how fast would it be? Starts nothing."""
    from cluster.cli.plan_command import run_plan, run_trace
    from cluster.whatif.request import PlanRequest

    request = PlanRequest(model, cluster, batch, context, dtype, min_copies, max_batch_tokens, expert_load, even, fast)
    if trace is not None:
        run_trace(request, trace, console, as_json, html, png)
        return
    if png is not None:
        raise ConfigError("--png draws what a trace does", fix="give --trace FILE too, or use --html")
    raise typer.Exit(0 if run_plan(request, console, as_json, html) else 1)


@app.command()
def fetch(path: Annotated[str, typer.Argument(help="hf://owner/name or modelscope://owner/name")],
          revision: Annotated[str | None, typer.Option(help="Branch, tag or commit  [default: main]")] = None) -> None:
    """Fetch a model into the hub's cache on this machine; every new file is compared with its hash. Prints its folder.
    """
    from cluster.device.model_store import locate_checkpoint

    config = check_options(ModelConfig, {"path": path, "revision": revision}, "the command line", "model")
    for part in ("facts", "all"):       # the first asks the hub which commit it is now
        folder = locate_checkpoint(config, part, lambda line: notes.print(line, markup=False, highlight=False))
    typer.echo(folder)


@app.command()
def demo(config: Annotated[Path | None, typer.Option(help="Instead of examples/demo.yaml")] = None,
         state_dir: StateDir = None) -> None:
    """Serve a small real chat model on three local nodes, and ask it something through each door."""
    config, directory = config or DEMO_CONFIG, state_dir or default_state_dir()
    if not config.is_file():
        raise ConfigError(f"{config} is not there", fix="run the demo from a clone of the repository")
    loaded = load_config(config)
    starter_pid = start_supervised(directory, loaded.application)

    from cluster.cli.demo import run_demo

    run_demo(console, loaded, directory, starter_pid)


def main() -> None:
    """Run the command line. Errors that people can mend are shown without a traceback; exit code 1, 2 for wrong usage,
    128 + n when signal n ended it."""
    ready_process()
    try:
        with interruptible(ENDING_SIGNALS):
            app()
    except (ServingError, ModelError, OSError) as error:     # of OSErrors: disks that are full or closed to us
        notes.print(f"moesaic: {error}", markup=False, highlight=False, style="red", soft_wrap=True)
        sys.exit(1)
    except Interrupted as interrupted:
        console.show_cursor()       # a display that was ended with its process had hidden it
        notes.print(f"moesaic: {interrupted}", markup=False, highlight=False)
        sys.exit(interrupted.exit_code)
