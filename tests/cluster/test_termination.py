"""A process that is sent SIGTERM ends what it does first, wherever its loop runs."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.deadlines import PATIENCE_S

PROGRAM = """
import asyncio, signal, sys, threading
from cluster.termination import until_told_to_end

signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))       # in the way of Ray's

async def main():
    print("runs", flush=True)
    try:
        await asyncio.sleep(600)
    finally:
        await asyncio.sleep(0)
        print("has left", flush=True)

threading.Thread(target=lambda: asyncio.run(until_told_to_end(main())), daemon=True).start()
threading.Event().wait()
"""


def test_it_is_cancelled_and_the_process_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, rest, errors) == (0, "has left\n", "")
