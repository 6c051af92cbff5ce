"""TCP ports for tests, which nobody else on the machine is given while the tests run."""

from __future__ import annotations

import atexit

from cluster.device.node import ReservedPort


def held_port() -> int:
    """Return a port on 127.0.0.1 that a server which a test starts can listen on, if it sets SO_REUSEADDR."""
    reserved = ReservedPort("127.0.0.1")
    atexit.register(reserved.close)
    return reserved.port
