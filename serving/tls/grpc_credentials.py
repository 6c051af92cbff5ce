"""What gRPC is given of an identity."""

from __future__ import annotations

import grpc

from serving.tls.identity import Identity, RenewedIdentity


def server_credentials(identity: RenewedIdentity) -> grpc.ServerCredentials:
    """Return credentials that gRPC asks for the certificate of the moment at every handshake, on a thread of its own.
    With a CA clients must show a certificate of it."""
    shown = identity.current()

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal shown
        found = identity.current()
        if found is shown:
            return None
        shown = found
        return _configuration(found)
    return grpc.dynamic_ssl_server_credentials(_configuration(shown), renewed,
                                               require_client_authentication=shown.ca is not None)


def channel_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """Return those of one channel, which keeps them to its end."""
    return grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)


def _configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.ca)
