"""`moesaic demo`: a real chat model on three local nodes, asked through each door, and while a shard is killed."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import platformdirs
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from cluster.cli.chat import GrpcChatClient, HttpChatClient, Limits, Message
from cluster.cli.conversation import print_answer
from cluster.cli.lost_shard import show_a_loss
from cluster.cli.start_display import StartDisplay
from cluster.cli.status_table import StatusView
from cluster.coordinator.view import ClusterStatus
from cluster.launch.bring_up import BringUp
from cluster.launch.cluster_client import ClusterClient
from cluster.launch.state_file import RunningCluster
from serving.config import ConfigError, ServeConfig

_GRPC_QUESTION = "What is a mixture of experts? Answer in two sentences."
_HTTP_QUESTION = "Write a haiku about three computers that think together."
_LOSS_QUESTION = "Tell a long story about a lighthouse and its keeper."
_MAX_TOKENS = 96
_LOSS_TOKENS = 200      # long enough to be seen, and for its node to be told
_SETTLE_S = 4.0         # shards report every second
_STAGES = {"wait": "waiting for another process", "fetch": "fetching", "write": "upcycling"}


def run_demo(console: Console, config: ServeConfig, state_dir: Path, starter_pid: int) -> RunningCluster:
    """Leaves the service running. `starter_pid` as in BringUp. Raises ServingError, ModelError."""
    config = prepare_demo(console, config)
    display = StartDisplay(console, config)
    with display, BringUp(config, state_dir, display, starter_pid).running() as running:
        display.close()
        _ask_and_show(console, running)
    return running


def _ask_and_show(console: Console, running: RunningCluster) -> None:
    for chat, question in ((GrpcChatClient(running.grpc_address, trust=running.trust), _GRPC_QUESTION),
                           (HttpChatClient(running.http_address, trust=running.trust), _HTTP_QUESTION)):
        console.rule(f"over {chat.name}", align="left")
        console.print(question, style="bold")
        answered = print_answer(console, chat, [Message("user", question)], Limits(_MAX_TOKENS, 0.0))
        console.print(answered.summary(), style="dim")
    client = ClusterClient(running.application)     # connected since the start
    console.rule("who computed what", align="left")
    console.print(StatusView(_settled(client)))
    console.rule("a node is lost", align="left")
    with _without_reports_of_ray(console):
        show_a_loss(console, GrpcChatClient(running.grpc_address, trust=running.trust), _LOSS_QUESTION, _LOSS_TOKENS,
                    client.status)
    console.print(_how_to_go_on(running), markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _without_reports_of_ray(console: Console) -> Iterator[None]:
    """Ray writes that a process has died to standard output, in the middle of the answer."""
    console.file = console.file         # for good: else it is whatever standard output is when it prints
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def prepare_demo(console: Console, config: ServeConfig) -> ServeConfig:
    """Return the demo's config with the folder of its checkpoint, which is made if it is not there."""
    try:
        from model.demo_checkpoint import ensure_demo_checkpoint  # seconds: torch
    except ModuleNotFoundError as error:
        raise ConfigError(f"the demo needs the package {error.name}", fix="pip install 'moesaic[demo]'") from error

    columns = (TextColumn("{task.description:<28}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("demo model", total=None)

        def report(stage: str, done: int, total: int) -> None:
            bars.update(task, description=f"demo model: {_STAGES.get(stage, stage)}", completed=done, total=total)
        folder = ensure_demo_checkpoint(platformdirs.user_cache_path("moesaic"), report)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(folder)})})


def _settled(client: ClusterClient) -> ClusterStatus:
    """Return the status when the shards have reported what they did last."""
    until_s = time.monotonic() + _SETTLE_S
    while True:
        status = client.status()
        if time.monotonic() > until_s or not any(shard.num_running for _, shard in status.shards):
            return status
        time.sleep(_SETTLE_S / 20)


def _how_to_go_on(running: RunningCluster) -> str:
    moesaic = "moesaic" if shutil.which("moesaic") else os.path.relpath(sys.argv[0])     # `make demo` activates nothing
    return f"""
The service goes on. Talk to it:
  {moesaic} chat                    (or: {moesaic} chat "a question", {moesaic} chat --grpc)
  curl {running.http_url}/v1/chat/completions -H 'content-type: application/json' \\
    -d '{{"model": "{running.model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
  any OpenAI client with base_url={running.http_url}/v1, or gRPC (reflection is on) at {running.grpc_address}
Look at it: {moesaic} status        Logs: {running.log_dir}
Stop it:    {moesaic} down"""
