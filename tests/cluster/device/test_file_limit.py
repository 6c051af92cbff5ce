"""The soft limit of files is raised, and admission promises no more than the limit allows."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.device.file_limit import bounded_by_files, max_http_connections
from serving.config import AdmissionConfig

RAISE = ("import resource; from cluster.device.file_limit import raise_file_limit; "
         "print(raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))")


@pytest.mark.parametrize(("soft", "hard"), [(64, 512), (512, 512)])
def test_the_soft_limit_becomes_the_hard_one(soft: int, hard: int) -> None:
    done = subprocess.run(["bash", "-c", f'ulimit -Sn {soft}; ulimit -Hn {hard}; exec "$0" -c "$1"', sys.executable,
                           RAISE], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.split() == [str(hard)] * 3


def test_enough_files_change_nothing() -> None:
    admission = AdmissionConfig()
    assert bounded_by_files(admission, 1 << 20, 4) is admission


@pytest.mark.parametrize(("max_files", "num_routers"), [(1024, 1), (1024, 3), (64, 1)])
def test_with_few_files_open_and_queued_requests_fit_them(max_files: int, num_routers: int) -> None:
    admission = bounded_by_files(AdmissionConfig(), max_files, num_routers)
    promised = num_routers * (admission.max_open_requests + admission.max_queued_requests)
    assert promised <= max(2 * num_routers, (max_files - 256) // 2)
    assert admission.max_open_requests >= 1 and admission.max_queued_requests >= 1
    assert admission.max_queued_tokens == AdmissionConfig().max_queued_tokens


def test_connections_are_enough_for_admission_and_no_more_than_files() -> None:
    usual = AdmissionConfig()
    assert max_http_connections(usual, 1 << 20) == 8192
    assert max_http_connections(usual.model_copy(update={"max_open_requests": 10_000}), 1 << 20) == 44_096
    assert max_http_connections(usual, 1024) == 384 and max_http_connections(usual, 10) == 2
