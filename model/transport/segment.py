"""The memory that a pair of processes shares: without a name, so nothing is left of it when both are gone."""

from __future__ import annotations

import fcntl
import os
import stat

from model.transport.handshake import HandshakeError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def new_segment(num_bytes: int) -> int:
    """Return the file descriptor of zeroed memory that cannot change its size: it goes to one other process."""
    segment = os.memfd_create("moesaic-pair", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(segment, stat.S_IRUSR | stat.S_IWUSR)
        os.ftruncate(segment, num_bytes)
        fcntl.fcntl(segment, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(segment)
        raise
    return segment


def check_segment(segment: int, num_bytes: int) -> None:
    """Raise HandshakeError when it is none: memory that shrinks under a process kills it."""
    try:
        good = os.fstat(segment).st_size == num_bytes and fcntl.fcntl(segment, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError as error:
        raise HandshakeError(f"its segment is none: {error}") from error
    if not good:
        raise HandshakeError("its segment has another size, or could change it")
