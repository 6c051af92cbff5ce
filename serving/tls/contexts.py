"""Contexts of Python's ssl from PEM texts in memory: what was judged is what is used, whatever happens to the files."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator


def server_context(certificate: bytes, key: bytes, ca: bytes | None = None) -> ssl.SSLContext:
    """Return one for TLS 1.2 and 1.3; with `ca` clients must show a certificate of it. Raises ssl.SSLError,
    ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _load(context, certificate, key)
    context.set_alpn_protocols(["http/1.1"])
    if ca is not None:
        context.load_verify_locations(cadata=_text(ca))
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(certificate: bytes, key: bytes, ca: bytes) -> ssl.SSLContext:
    """Return one that shows a certificate and believes those of `ca`. Raises ssl.SSLError, ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(context, certificate, key)
    context.load_verify_locations(cadata=_text(ca))
    return context


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, server_name: str) -> None:
    """Do a whole handshake in memory. Raises ssl.SSLError with what either side would not believe."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(to_client, to_server, server_hostname=server_name),
             server.wrap_bio(to_server, to_client, server_side=True)]
    while sides:
        for side in list(sides):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                sides.remove(side)


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    with _as_file(certificate + b"\n" + key) as path:
        context.load_cert_chain(path, password=_refuse_password)


def _refuse_password() -> str:
    raise ValueError("the key has a password")


def _text(pem: bytes) -> str:
    """Raises ValueError: ssl takes what is no ASCII for another format."""
    return pem.decode("ascii")


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """Give ssl, which reads files only, one that is on no disk."""
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)
