"""A process that answers heartbeats, and holds Python's lock when it is told to. See test_heartbeats.py."""

from __future__ import annotations

import ctypes
import json
import signal
import sys

from cluster.shard.heartbeats import Heartbeats
from tests.model.transport.members import from_json


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG: it dies with the test
    beats = Heartbeats(from_json(json.loads(sys.argv[1])), limit_s=1.0)
    sys.stdout.write(f"{beats.port}\n")
    sys.stdout.flush()
    # Unlike CDLL it keeps the lock during the call, which lasts until the test writes a byte.
    ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)


if __name__ == "__main__":
    main()
