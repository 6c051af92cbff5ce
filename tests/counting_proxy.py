"""A proxy that only counts: whoever asks it for anything has taken the wrong way."""

from __future__ import annotations

import contextlib
import socket
import threading

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY",
             "GRPC_PROXY")


class CountingProxy:
    """Takes connections, notes what they ask for, and hangs up."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.variables = {**dict.fromkeys(VARIABLES, url), "no_proxy": "", "NO_PROXY": ""}
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection:
                    self.asked.append(connection.recv(100))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
