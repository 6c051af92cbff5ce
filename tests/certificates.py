"""Certificates made on the spot."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    certificate: bytes
    key: bytes

    def write(self, folder: Path, name: str = "door") -> tuple[str, str]:
        """Return the paths of certificate and key."""
        paths = folder / f"{name}.crt", folder / f"{name}.key"
        for path, content in zip(paths, (self.certificate, self.key), strict=True):
            replace_file(path, content)
        return str(paths[0]), str(paths[1])


class Authority:
    """A CA."""

    def __init__(self, name: str = "test CA") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        now = datetime.datetime.now(datetime.UTC)
        builder = _builder(self._name, self._name, self._key, now + _DAY)
        self._certificate = builder.add_extension(x509.BasicConstraints(True, None), critical=True).sign(
            self._key, hashes.SHA256())
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, *names: str, lifetime: datetime.timedelta = _DAY, password: bytes | None = None) -> Issued:
        """Return a certificate for DNS names and addresses."""
        key = ec.generate_private_key(ec.SECP256R1())
        until = datetime.datetime.now(datetime.UTC) + lifetime
        builder = _builder(_name(names[0] if names else "nobody"), self._name, key, until)
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(name) for name in names]), False)
        encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        return Issued(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))


def replace_file(path: Path, content: bytes) -> None:
    """Do as those do who renew certificates: another file takes the place."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)


def serial_of(certificate: bytes) -> int:
    """Return the number that tells certificates apart: of PEM or DER."""
    load = x509.load_pem_x509_certificate if certificate.startswith(b"-") else x509.load_der_x509_certificate
    return load(certificate).serial_number


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def _alternative(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, until: datetime.datetime
             ) -> x509.CertificateBuilder:
    return x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(
        key.public_key()).serial_number(x509.random_serial_number()).not_valid_before(
        until - 3 * _DAY).not_valid_after(until)
