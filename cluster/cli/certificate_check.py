"""The doctor's look at certificates: whether they can be used, for what, and how long."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509

from cluster.cli.doctor import Check, Verdict
from cluster.launch.door_trust import names_of
from serving.config import ServeConfig
from serving.tls.identity import Identity, read_identity

_SOON = datetime.timedelta(days=14)     # cert-manager renews a certificate of 90 days 30 days before its end


def certificate_checks(config: ServeConfig, now: datetime.datetime) -> Iterator[Check]:
    """Yield one for each certificate. Raises ConfigError for one that cannot be used."""
    for option, files in config.certificates.items():
        if Path(files.certificate).is_file() or config.local_nodes:
            yield _check(option, read_identity(files, option), now)
        else:
            yield Check(option, Verdict.WARN, f"{files.certificate} is not on this machine",
                        "run the doctor on a node, too: routers and shards read their own node's files")


def _check(option: str, identity: Identity, now: datetime.datetime) -> Check:
    certificate = x509.load_pem_x509_certificates(identity.certificate)[0]
    until = certificate.not_valid_after_utc
    found = f"for {', '.join(names_of(identity.certificate.decode())) or 'no name'}, until {until:%Y-%m-%d %H:%M} UTC"
    if until <= now:
        return Check(option, Verdict.FAIL, f"{found}: expired", "renew it: no client takes it any more")
    if until - now < _SOON:
        return Check(option, Verdict.WARN, found, "see that it is renewed: new files count without a restart")
    return Check(option, Verdict.OK, found)

