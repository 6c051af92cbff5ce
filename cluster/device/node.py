"""A node as the processes on it know it: its identity, and the ports that they take there."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from serving.errors import ServingError

_BACKLOG = 2048         # connections that the system may take before this process does
NODE_LABEL = "moesaic-node"     # Ray label that gives a node its name; without it the host's name is used


class PortTakenError(ServingError):
    pass


@dataclass(frozen=True, slots=True)
class NodeIdentity:
    node_id: str        # Ray's
    name: str           # as people know it
    address: str        # IP address that the other nodes reach


class ReservedPort:
    """A free TCP port that stays free for this process: bound, but never listened on.

    With SO_REUSEADDR on both sockets Linux lets another socket listen on it, and gives it to nobody who asks for any
    free port.
    """

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, 0))
        self.port = int(self._socket.getsockname()[1])

    def close(self) -> None:
        self._socket.close()


def free_port(address: str = "127.0.0.1") -> int:
    """Return a TCP port that is free now; keep a ReservedPort where it must stay so."""
    reserved = ReservedPort(address)
    reserved.close()
    return reserved.port


def host_and_port(host: str, port: int) -> str:
    """Return host:port as URLs and gRPC write it: an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(address: str, port: int) -> socket.socket:
    """Return a socket that listens there; at "::" for IPv4 too. Raises OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=_BACKLOG,
                                dualstack_ipv6=address == "::" and socket.has_dualstack_ipv6())


def port_fault(address: str, port: int) -> str | None:
    """Return why a server could not listen there now, or None when it could."""
    try:
        listen(address, port).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
