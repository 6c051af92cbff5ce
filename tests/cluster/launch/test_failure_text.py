"""The error that stopped a deployment is found in what Serve says of it."""

from __future__ import annotations

import pytest

from cluster.launch.failure_text import MAX_CHARACTERS, first_error

CONSTRUCTOR = """\
The deployment failed to start 3 times in a row. This may be due to a problem with its constructor or initial health \
check failing. See controller logs for details. Error:
\x1b[36mray::ServeReplica:moesaic:Shard-cpu.initialize_and_get_metadata()\x1b[39m (pid=1, ip=192.0.2.2, repr=<object>)
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 449, in result
    return self.__get_result()
           ^^^^^^^^^^^^^^^^^^^
  File "/venv/ray/serve/_private/replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/venv/ray/serve/_private/replica.py", line 4010, in _call_func_or_gen
    result = await result
             ^^^^^^^^^^^^
  File "/repo/cluster/device/facts.py", line 32, in measure_device
    raise ConfigError(
serving.config.ConfigError: pool cpu: memory_budget is 93.13 GiB. lower memory_budget:
  it is above 23.54 GiB
"""
SHADOWED = """\
The deployment failed to start 3 times in a row. Error:
Exception when allocating Replica(id='4w', deployment='Shard-cpu', app='moesaic'):
Traceback (most recent call last):
  File "/venv/ray/_private/worker.py", line 1055, in get_objects
    raise value
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task, \x1b[36mray::X\x1b[39m
  File "/repo/serving/engine/expert_load.py", line 15, in <module>
    from model.placement import Placement
  File "/home/user/model.py", line 1, in <module>
    import mine
ModuleNotFoundError: No module named 'mine'

"""
GROUP = """\
  + Exception Group Traceback (most recent call last):
  |   File "/repo/serving/supervision.py", line 20, in run_endless
  |     async with asyncio.TaskGroup() as tasks:
  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "/repo/cluster/router_replica.py", line 70, in _start_grpc
    |     raise PortTakenError(
    | cluster.device.node.PortTakenError: ports 9000 to 9063 are all taken. set router.grpc_port to 0
    +------------------------------------
"""


@pytest.mark.parametrize(("text", "error"), [
    (CONSTRUCTOR, "pool cpu: memory_budget is 93.13 GiB. lower memory_budget:\n  it is above 23.54 GiB"),
    (SHADOWED, "ModuleNotFoundError: No module named 'mine' (/home/user/model.py, line 1)"),
    (GROUP, "ports 9000 to 9063 are all taken. set router.grpc_port to 0"),
    ("The actor died unexpectedly.\nWorker exit type: SYSTEM_ERROR", "The actor died unexpectedly. Worker exit type: "
                                                                    "SYSTEM_ERROR"),
    ("", "")])
def test_the_cause_is_found(text: str, error: str) -> None:
    assert first_error(text) == error


def test_what_has_no_traceback_is_not_endless() -> None:
    assert len(first_error("a b\n" * 10_000)) == MAX_CHARACTERS
