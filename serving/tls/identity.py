"""A certificate with its key, from files that somebody renews (cert-manager, certbot): judged before they are used."""

from __future__ import annotations

import logging
import os
import ssl
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509

from serving.config import ClusterTlsConfig, ConfigError, TlsConfig
from serving.tls.contexts import client_context, server_context, shake_hands

logger = logging.getLogger(__name__)

# Members of a cluster have addresses that change, so certificates of links are for this name, whatever the address.
CLUSTER_NAME = "moesaic.internal"
_NO_MATCH = "KEY_VALUES_MISMATCH"


@dataclass(frozen=True, slots=True)
class Identity:
    """Holds PEM texts. With `ca` both sides of a connection show certificates of it."""

    certificate: bytes                      # the own one first, then those between it and the root
    key: bytes = field(repr=False)
    ca: bytes | None = None

    @property
    def expires_s(self) -> float:
        """Return until when the certificate counts, as Unix time."""
        return x509.load_pem_x509_certificates(self.certificate)[0].not_valid_after_utc.timestamp()


def read_identity(files: TlsConfig, option: str) -> Identity:
    """Read and judge; `option` is their key in the config. Raises ConfigError."""
    identity = Identity(_read(files.certificate, f"{option}.certificate"), _read(files.key, f"{option}.key"),
                        _read(files.ca, f"{option}.ca") if isinstance(files, ClusterTlsConfig) else None)
    try:
        server = server_context(identity.certificate, identity.key, identity.ca)
        x509.load_pem_x509_certificates(identity.certificate)   # stricter than OpenSSL, and metrics read it so
    except (ssl.SSLError, ValueError) as error:
        raise _unusable(files, option, error) from error
    if identity.ca is not None:
        client = client_context(identity.certificate, identity.key, identity.ca)
        try:
            shake_hands(client, server, CLUSTER_NAME)
        except ssl.SSLError as error:
            raise ConfigError(
                f"{option}: {files.certificate} does not hold before the cluster's own CA: {_reason(error)}",
                fix=f"have it signed by the CA in {option}.ca, for the name {CLUSTER_NAME} (a DNS name of "
                    "subjectAltName), for servers and clients, and renewed in time") from error
    return identity


class RenewedIdentity:
    """Is what the files hold now. Threads may share it."""

    def __init__(self, files: TlsConfig, option: str) -> None:
        """Raises ConfigError."""
        self._files = files
        self._option = option
        self._lock = threading.Lock()
        self._seen = self._look()
        self._current = read_identity(files, option)

    def current(self) -> Identity:
        """Return the same object until the files change. Those that cannot be used are logged once, and the last that
        could be go on: a key and its certificate are seldom written in one moment."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._seen = seen
                try:
                    self._current = read_identity(self._files, self._option)
                    logger.info("certificate_renewed option=%s file=%s", self._option, self._files.certificate)
                except ConfigError as error:
                    logger.error("certificate_not_renewed option=%s error=%s", self._option, error)
            return self._current

    def remaining_s(self) -> float:
        """Return for how long the certificate of this moment still counts; below 0: it does not any more."""
        return self.current().expires_s - time.time()

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        ca = (self._files.ca,) if isinstance(self._files, ClusterTlsConfig) else ()
        return tuple(_state_of(path) for path in (self._files.certificate, self._files.key, *ca))


def _state_of(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: str, option: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error.strerror or error}",
                          fix="give the path of a PEM file that this process may read; every node needs it") from error


def _unusable(files: TlsConfig, option: str, error: Exception) -> ConfigError:
    if isinstance(error, ssl.SSLError) and error.reason == _NO_MATCH:
        return ConfigError(f"{option}: the key in {files.key} is not that of the certificate in {files.certificate}",
                           fix="give the certificate and the key that were made together; the certificate of the door "
                               "stands first in its file, before those of CAs")
    return ConfigError(f"{option}: {files.certificate} and {files.key} cannot be used: {_reason(error)}",
                       fix="give a certificate and its key as PEM texts, the key without a password")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (isinstance(error, ssl.SSLError) and error.reason) or str(error)
