"""Limits of containers, read from trees of files as Linux shows them, and from a real control group where one can be
made."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.device.host_limits import (
    HostCpus,
    HostMemory,
    Mount,
    group_folders,
    host_cpus,
    host_memory,
    limited_cpus,
    limited_memory,
    parse_membership,
    parse_mounts,
)

GIB = 1 << 30
MACHINE = HostMemory(32 * GIB, 22 * GIB)
V2 = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = ("35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
      "36 31 0:33 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n")


def tree(root: Path, membership: str, mounts: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": membership, "proc/self/mountinfo": mounts, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


def v2(root: Path, path: str, files: dict[str, str]) -> Path:
    return tree(root, f"0::{path}\n", V2, {f"sys/fs/cgroup/{name}": content for name, content in files.items()})


def test_without_control_groups_the_machine_is_what_there_is(tmp_path: Path) -> None:
    assert limited_memory(MACHINE, tmp_path) == MACHINE
    assert limited_cpus(8, tmp_path) == HostCpus(8)


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    root = v2(tmp_path, "/a", {"a/memory.max": "max\n", "a/memory.high": "max\n", "a/memory.current": f"{GIB}\n",
                               "a/memory.stat": "anon 5\n", "a/cpu.max": "max 100000\n"})
    assert limited_memory(MACHINE, root) == MACHINE and limited_cpus(8, root) == HostCpus(8)


def test_a_container_of_version_2_counts_without_its_page_cache(tmp_path: Path) -> None:
    root = v2(tmp_path, "/", {
        "memory.max": f"{3 * GIB // 2}\n", "memory.current": f"{GIB}\n", "cpu.max": "250000 100000\n",
        "memory.stat": f"anon 7\ninactive_file {GIB // 2}\nactive_file {GIB // 8}\nslab_reclaimable {GIB // 8}\n"})
    memory = limited_memory(MACHINE, root)
    assert (memory.total_bytes, memory.available_bytes) == (3 * GIB // 2, 5 * GIB // 4)
    assert memory.limited_by.endswith("/sys/fs/cgroup/memory.max")
    cpus = limited_cpus(8, root)
    assert cpus.num_cpus == 2 and cpus.limited_by.endswith("cpu.max")


@pytest.mark.parametrize(("files", "total", "available"), [
    ({"a/memory.max": "max", "memory.max": str(4 * GIB)}, 4, 4),                        # the parent's
    ({"a/memory.max": str(4 * GIB), "a/memory.high": str(2 * GIB)}, 2, 2),              # slowed down there
    ({"a/memory.max": str(4 * GIB), "a/b/memory.max": str(8 * GIB)}, 4, 4),
    ({"a/memory.max": str(4 * GIB), "a/memory.current": str(5 * GIB)}, 4, 0),
    ({"a/b/memory.max": str(4 * GIB), "a/memory.max": str(8 * GIB), "a/memory.current": str(7 * GIB)}, 4, 1)])
def test_every_group_around_counts(tmp_path: Path, files: dict[str, str], total: int, available: int) -> None:
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    memory = limited_memory(MACHINE, v2(tmp_path, "/a/b", files))
    assert (memory.total_bytes, memory.available_bytes) == (total * GIB, available * GIB)


@pytest.mark.parametrize(("path", "root", "folder"), [
    ("/docker/x", "/docker/x", ""),     # a container that sees its own group as the root of the mount
    ("/docker/x", "/", "docker/x/"),    # one that sees the paths of the machine outside
    ("/docker/x", "/", ""),             # and a mount that does not show them
    ("/../x", "/", "")])
def test_a_container_of_version_1(tmp_path: Path, path: str, root: str, folder: str) -> None:
    memory, cpu = f"sys/fs/cgroup/memory/{folder}", f"sys/fs/cgroup/cpu,cpuacct/{folder}"
    files = {f"{memory}memory.limit_in_bytes": f"{2 * GIB}\n", f"{memory}memory.usage_in_bytes": f"{GIB}\n",
             f"{memory}memory.stat": f"total_inactive_file {GIB // 4}\ntotal_active_file {GIB // 4}\n",
             f"{cpu}cpu.cfs_quota_us": "150000\n", f"{cpu}cpu.cfs_period_us": "100000\n"}
    tree(tmp_path, f"5:memory:{path}\n4:cpu,cpuacct:{path}\n1:name=systemd:/\n", V1.format(root=root), files)
    found = limited_memory(MACHINE, tmp_path)
    assert (found.total_bytes, found.available_bytes) == (2 * GIB, 3 * GIB // 2)
    assert limited_cpus(8, tmp_path).num_cpus == 1


def test_version_1_says_the_limit_of_groups_that_are_not_seen(tmp_path: Path) -> None:
    memory = "sys/fs/cgroup/memory"
    files = {f"{memory}/memory.limit_in_bytes": "9223372036854771712\n", f"{memory}/memory.usage_in_bytes": "0\n",
             f"{memory}/memory.stat": f"hierarchical_memory_limit {GIB}\n",
             "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"}
    tree(tmp_path, "5:memory:/\n4:cpu,cpuacct:/\n", V1.format(root="/"), files)
    assert limited_memory(MACHINE, tmp_path).total_bytes == GIB
    assert limited_cpus(8, tmp_path) == HostCpus(8)


def test_both_versions_at_once(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n", "sys/fs/cgroup/unified/cpu.max": "100000 100000"}
    mounts = V1.format(root="/") + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    tree(tmp_path, "5:memory:/\n0::/\n", mounts, files)
    assert limited_memory(MACHINE, tmp_path).total_bytes == GIB
    assert limited_cpus(8, tmp_path).num_cpus == 1


def test_what_is_not_understood_is_no_limit(tmp_path: Path) -> None:
    root = tree(tmp_path, "nonsense\n0::/\n", f"x\n{V2}", {
        "sys/fs/cgroup/memory.max": "many", "sys/fs/cgroup/memory.stat": "a b c\nd e\n",
        "sys/fs/cgroup/cpu.max": "1 0"})
    assert limited_memory(MACHINE, root) == MACHINE and limited_cpus(4, root) == HostCpus(4)


def test_the_files_of_the_kernel_are_parsed() -> None:
    assert parse_membership("4:cpu,cpuacct:/a:b\n0::/c\n") == {"cpu": "/a:b", "cpuacct": "/a:b", "": "/c"}
    line = r"36 31 0:33 / /mnt/with\040space rw,relatime shared:1 master:2 - cgroup cgroup rw,memory"
    mount = parse_mounts(f"27 1 254:0 / / rw - ext4 /dev/vda rw\n{line}\n")[0]
    assert mount.point == "/mnt/with space" and "memory" in mount.controllers
    assert group_folders(Mount(("",), "/", "/m"), "/a/b") == ["/m/a/b", "/m/a", "/m"]


def test_this_machine_has_memory_and_cpus() -> None:
    memory = host_memory()
    assert 0 < memory.available_bytes <= memory.total_bytes and host_cpus().num_cpus >= 1


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A control group of this machine, as root may make one."""
    folder = Path("/sys/fs/cgroup/memory/moesaic-test")
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    with contextlib.suppress(OSError):
        folder.rmdir()


def test_a_real_control_group_bounds_what_is_found_inside(real_group: Path) -> None:
    (real_group / "memory.limit_in_bytes").write_text(str(3 * GIB // 2), encoding="utf-8")
    inside = ("import sys; open(sys.argv[1], 'w').write('0'); from cluster.device.host_limits import host_memory; "
              "found = host_memory(); print(found.total_bytes, found.available_bytes)")
    done = subprocess.run([sys.executable, "-c", inside, str(real_group / "cgroup.procs")], capture_output=True,
                          encoding="utf-8", check=True)
    total, available = map(int, done.stdout.split())
    assert total == 3 * GIB // 2 and GIB < available <= total
