from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from cluster.device.node import ReservedPort, host_and_port, port_fault


def test_a_reserved_port_is_kept_from_others_and_can_be_listened_on() -> None:
    reserved = ReservedPort("127.0.0.1")
    try:
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", reserved.port))
            server.listen(1)
            with socket.create_connection(("127.0.0.1", reserved.port), timeout=5.0):
                pass
            assert port_fault("127.0.0.1", reserved.port) is not None
        others = [ReservedPort("127.0.0.1") for _ in range(50)]
        assert reserved.port not in {other.port for other in others}
        for other in others:
            other.close()
    finally:
        reserved.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "0.0.0.0"])
def test_a_port_is_tried_in_the_addresses_own_family(host: str) -> None:
    reserved = ReservedPort(host)
    reserved.close()
    assert port_fault(host, reserved.port) is None
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
        server.bind((host, reserved.port))
        server.listen(1)
        assert "in use" in str(port_fault(host, reserved.port))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "fe80::1", "node-a"])
def test_an_address_in_a_url_is_read_back(host: str) -> None:
    parts = urlsplit(f"http://{host_and_port(host, 80)}/v1")
    assert (parts.hostname, parts.port) == (host, 80)
