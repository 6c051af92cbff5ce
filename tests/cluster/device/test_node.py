from __future__ import annotations

import socket

from cluster.device.node import ReservedPort, is_port_free


def test_a_reserved_port_is_kept_from_others_and_can_be_listened_on() -> None:
    reserved = ReservedPort("127.0.0.1")
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", reserved.port))
            server.listen(1)
            with socket.create_connection(("127.0.0.1", reserved.port), timeout=5.0):
                pass
            assert not is_port_free("127.0.0.1", reserved.port)
        others = [ReservedPort("127.0.0.1") for _ in range(50)]
        assert reserved.port not in {other.port for other in others}
        for other in others:
            other.close()
    finally:
        reserved.close()
