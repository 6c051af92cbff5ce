"""What was started here is found by its note, anything else by its address. (With a cluster: tests/e2e)"""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli.reaching import reached
from cluster.launch.state_file import NoClusterError, RunningCluster, write_state
from tests.ports import held_port


@pytest.mark.parametrize("is_noted", [True, False])
def test_the_address_counts_before_the_note(is_noted: bool, tmp_path: Path) -> None:
    noted, given = (f"127.0.0.1:{held_port()}" for _ in range(2))
    write_state(RunningCluster("one", noted, "", "m"), tmp_path)
    with pytest.raises(NoClusterError, match=f"no Ray cluster answers at {noted if is_noted else given}"), \
            reached(None, tmp_path, None if is_noted else given):
        raise AssertionError("there is no cluster")
