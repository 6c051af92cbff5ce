"""Which members share the threads of a machine."""

from __future__ import annotations

from dataclasses import replace

from cluster.shard.shared_host import host_threads
from model.host_threads import HostThreads
from model.transport.address import EndpointAddress, Secret
from serving.link.epoch import DeviceFacts, DeviceProfile, Member

PROFILE = DeviceProfile("measured", 1e9, ((1, 1e9),), ((1, 1e-3),), ((1, 1e-3),), ((1, 1e-3),), 1e-6)


def member(name: str, machine: str, num_threads: int = 2, device: str = "cpu") -> Member:
    facts = DeviceFacts(device, "some", "packed-cpu", 1 << 30, num_threads)
    return Member(name, "pool", name, name, "", facts, profile=PROFILE,
                  endpoint=EndpointAddress(name, "127.0.0.1", 1, machine, Secret("")))


def test_members_of_one_machine_share() -> None:
    members = [member("a", "m1"), member("b", "m2"), member("c", "m1", 3)]
    assert host_threads(members, 0, 8) == HostThreads((2, 0, 3), 0, 8)
    assert host_threads(members, 2, 4) == HostThreads((2, 0, 3), 2, 4)
    assert host_threads(members, 1, 8) is None


def test_accelerators_and_emulated_members_do_not() -> None:
    slow = replace(PROFILE, emulated_speed=0.5)
    members = [member("a", "m"), member("b", "m", device="cuda:0"), replace(member("c", "m"), profile=slow)]
    assert [host_threads(members, rank, 8) for rank in range(3)] == [None] * 3
    members.append(member("d", "m"))
    assert host_threads(members, 0, 8) == HostThreads((2, 0, 0, 2), 0, 8)


def test_members_that_cannot_share_memory_do_not() -> None:
    assert host_threads([member("a", ""), member("b", "")], 0, 8) is None
