"""Files of certificates: judged before they are used, and read again when they change."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path

import pytest

from serving.config import ClusterTlsConfig, ConfigError, TlsConfig
from serving.tls.identity import CLUSTER_NAME, RenewedIdentity, read_identity
from tests.certificates import Authority, Issued, replace_file


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


def files_of(folder: Path, issued: Issued, ca: bytes | None = None) -> TlsConfig:
    certificate, key = issued.write(folder)
    if ca is None:
        return TlsConfig(certificate=certificate, key=key)
    replace_file(folder / "ca.crt", ca)
    return ClusterTlsConfig(certificate=certificate, key=key, ca=str(folder / "ca.crt"))


def test_a_key_is_not_shown(tmp_path: Path, authority: Authority) -> None:
    identity = read_identity(files_of(tmp_path, authority.issue("a.example")), "tls")
    assert identity.key.startswith(b"-----BEGIN PRIVATE KEY") and "PRIVATE" not in repr(identity)
    assert identity.ca is None


def test_it_says_how_long_its_certificate_counts_also_when_that_was_renewed(tmp_path: Path, authority: Authority
                                                                            ) -> None:
    files = files_of(tmp_path, authority.issue("a.example", lifetime=datetime.timedelta(days=10)))
    identity = RenewedIdentity(files, "tls")
    assert 8 * 86400 < identity.remaining_s() <= 10 * 86400
    authority.issue("a.example", lifetime=datetime.timedelta(days=60)).write(tmp_path)
    assert 58 * 86400 < identity.remaining_s() <= 60 * 86400


def test_what_cannot_be_used_is_refused_with_what_to_do(tmp_path: Path, authority: Authority) -> None:
    good = authority.issue("a.example")
    for issued, says in (
            (Issued(good.certificate, authority.issue("a.example").key), "door.key is not that of the certificate"),
            (Issued(b"nothing", good.key), "cannot be used: .*give a certificate and its key as PEM"),
            (Issued(good.certificate.replace(b" CERTIFICATE-", b" TRUSTED CERTIFICATE-"), good.key), "cannot be used"),
            (Issued(good.certificate, b"\xff\xfe"), "cannot be used"),
            (authority.issue("a.example", password=b"secret"), "the key has a password.*key without a password")):
        with pytest.raises(ConfigError, match=f"(?s)^tls: .*{says}"):
            read_identity(files_of(tmp_path, issued), "tls")
    missing = TlsConfig(certificate=str(tmp_path / "door.crt"), key=str(tmp_path / "none.key"))
    with pytest.raises(ConfigError, match=r"(?s)^tls\.key: .*none\.key cannot be read: No such file.*every node needs"):
        read_identity(missing, "tls")


def test_a_certificate_of_links_must_hold_before_the_clusters_ca(tmp_path: Path, authority: Authority) -> None:
    good = authority.issue(CLUSTER_NAME)
    assert read_identity(files_of(tmp_path, good, authority.pem), "cluster_tls").ca == authority.pem
    expired = authority.issue(CLUSTER_NAME, lifetime=-datetime.timedelta(hours=1))
    for issued, ca, says in ((authority.issue("other.internal"), authority.pem, "[Hh]ostname mismatch"),
                             (good, Authority("another").pem, "unable to get local issuer"),
                             (expired, authority.pem, "expired")):
        with pytest.raises(ConfigError, match=f"(?s)the cluster's own CA: .*{says}.*for the name {CLUSTER_NAME}"):
            read_identity(files_of(tmp_path, issued, ca), "cluster_tls")
    with pytest.raises(ConfigError, match="cluster_tls: .* cannot be used"):
        read_identity(files_of(tmp_path, good, b"no certificate"), "cluster_tls")


def test_renewed_files_count_at_once_and_bad_ones_do_not(tmp_path: Path, authority: Authority,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    first, second = authority.issue("a.example"), authority.issue("a.example")
    caplog.set_level(logging.INFO, "serving.tls.identity")
    files = files_of(tmp_path, first)
    renewed = RenewedIdentity(files, "tls")
    before = renewed.current()
    assert renewed.current() is before and not caplog.records
    replace_file(Path(files.key), second.key)       # the certificate comes a moment later
    assert renewed.current() is before and renewed.current() is before
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    replace_file(Path(files.certificate), second.certificate)
    after = renewed.current()
    assert after.certificate == second.certificate and renewed.current() is after
    Path(files.key).unlink()
    assert renewed.current() is after
    assert [record.message.split()[0] for record in caplog.records] == [
        "certificate_not_renewed", "certificate_renewed", "certificate_not_renewed"]
