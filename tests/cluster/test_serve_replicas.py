"""What Serve says of its deployments is read as it writes it. That it follows is for tests/e2e/test_pool_sizes.py."""

from __future__ import annotations

import warnings

from cluster.coordinator.pool_scale import Served, ServedPool

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # Ray's own, at import
    from cluster.serve_replicas import served_of


def deployment(status: str, target: int, *states: str) -> dict[str, object]:
    return {"status": status, "message": "1 replica waits for resources", "target_num_replicas": target,
            "replicas": [{"state": state} for state in states]}


def test_replicas_are_counted_that_run_and_the_message_of_a_pool_that_is_well_is_no_news() -> None:
    application = {"external_scaler_enabled": True, "deployments": {
        "Router": deployment("HEALTHY", 1, "RUNNING"), "Shard-cpu": deployment("HEALTHY", 2, "RUNNING", "UPDATING"),
        "Shard-gpu": deployment("UPSCALING", 3, "RUNNING", "STARTING", "STOPPING")}}
    assert served_of(application, ("gpu", "cpu", "later")) == Served({
        "gpu": ServedPool(3, 1, "1 replica waits for resources"), "cpu": ServedPool(2, 2)})


def test_an_application_whose_numbers_serve_keeps_for_itself() -> None:
    assert served_of({"external_scaler_enabled": False, "deployments": {}}, ("cpu",)) == Served({}, may_scale=False)
