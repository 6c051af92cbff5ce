"""The context of a door whose certificate is renewed while it is open: each handshake gets the one of its moment."""

from __future__ import annotations

import ssl

from serving.tls.contexts import server_context
from serving.tls.identity import RenewedIdentity


def door_context(identity: RenewedIdentity) -> ssl.SSLContext:
    """Return what a server is given once. Connections that are open go on with what they began with."""
    shown = identity.current()
    context = latest = server_context(shown.certificate, shown.key)

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, asked: ssl.SSLContext) -> None:
        """Is called in each handshake, before a certificate is shown."""
        nonlocal shown, latest
        found = identity.current()
        if found is not shown:
            shown, latest = found, server_context(found.certificate, found.key)
        connection.context = latest
    context.sni_callback = choose
    return context
