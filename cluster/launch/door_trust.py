"""How our own commands know doors that speak TLS.

They reach a router by an address of its node, for which its certificate need not be. On a machine that has the file of
the door's certificate they trust this very certificate and no other; elsewhere what the system trusts, and the name.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc  # takes a moment, which `moesaic up` need not wait for


@dataclass(frozen=True, slots=True)
class DoorTrust:
    """`certificate`: a path. Where it leads to nothing, or is "", the system's CAs count."""

    certificate: str = ""

    def context(self) -> ssl.SSLContext:
        """Raises ssl.SSLError."""
        own = self._own()
        if own is None:
            return ssl.create_default_context()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN       # else only a root may be trusted
        context.load_verify_locations(cadata=own)
        return context

    def channel(self, address: str) -> grpc.Channel:
        """Raises ValueError."""
        import grpc

        from serving.link.channel_options import DIRECT

        own = self._own()
        if own is None:
            return grpc.secure_channel(address, grpc.ssl_channel_credentials(), options=DIRECT)
        name = next(iter(names_of(own)), "").replace("*", "any")        # gRPC compares one in any case
        options = [*DIRECT, ("grpc.ssl_target_name_override", name)]
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(own.encode()), options=options)

    def _own(self) -> str | None:
        """Return the door's own certificate: the first in its file, as PEM."""
        try:
            text = Path(self.certificate).read_text(encoding="ascii") if self.certificate else ""
        except (OSError, UnicodeDecodeError):
            return None
        end = "-----END CERTIFICATE-----"
        head, found, _ = text.partition(end)
        return head + found + "\n" if found else None


def names_of(pem: str) -> list[str]:
    """Return the DNS names and addresses for which a certificate is. Raises ValueError."""
    from cryptography import x509

    found = x509.load_pem_x509_certificate(pem.encode())
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def split_address(text: str) -> tuple[str, DoorTrust | None]:
    """Read host:port, which may stand behind https:// -> host:port, and how to know the door; None: it is plain."""
    scheme, found, rest = text.partition("://")
    return rest if found else text, DoorTrust() if found and scheme == "https" else None
