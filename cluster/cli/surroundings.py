"""Readies this process, and what it starts, for whatever the user's terminal, folder and limits are."""

from __future__ import annotations

import io
import os
import sys

from rich.console import Console

from cluster.device.file_limit import raise_file_limit

console = Console()
notes = Console(stderr=True)        # errors, and what a pipe of the answer should not get


def ready_process() -> None:
    """Call it once, before anything is printed or started."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")        # a terminal that knows no such letter shows a question mark
    os.environ["PYTHONSAFEPATH"] = "1"      # no file of the user's folder is imported by the processes started here
    # To gRPC the empty one means none, whatever http_proxy says: all that speaks gRPC here is our own.
    os.environ["grpc_proxy"] = ""  # noqa: SIM112
    raise_file_limit()
