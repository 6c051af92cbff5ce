"""Says where an endpoint is found, and what both sides of a pair must know to choose how they talk."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = Path("/proc/self/ns/net")


class Secret:
    """Holds a text that is not to be logged or shown."""

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "(secret)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


@dataclass(frozen=True, slots=True)
class EndpointAddress:
    """Is passed on by whoever introduces members to each other. Who knows the token is let in."""

    peer_id: str                        # 32 hexadecimal digits, drawn anew by every process
    host: str                           # IP address
    port: int
    machine: str                        # processes of the same one share memory; "": this one never does
    token: Secret

    def shares_memory_with(self, other: EndpointAddress) -> bool:
        """Return the same answer on both sides."""
        return bool(self.machine) and self.machine == other.machine

    @property
    def socket_name(self) -> str:
        """Return the name of the Unix socket: abstract, so nothing is left of it when the process dies."""
        return f"\0moesaic-{self.peer_id}"


def this_machine() -> str:
    """Return a name that processes have in common which can share memory: one kernel and one network namespace, where
    they find each other's abstract sockets. "" where memory cannot be shared."""
    try:
        os.close(os.memfd_create("moesaic", os.MFD_CLOEXEC))
        seen = f"{_BOOT_ID.read_text(encoding='ascii').strip()} {_NETWORK.readlink()}"
    except OSError:
        return ""
    return hashlib.sha256(seen.encode()).hexdigest()[:16]
