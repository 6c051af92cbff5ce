"""Modules without a test file of their own name, each with the test that covers it on purpose.

A module with logic of its own gets tests/<same path>/test_<name>.py; here stand those that only others can show: parts
of one protocol, plain values, what needs a running cluster. Paths of tests are below tests/.
"""

from __future__ import annotations

COVERED_BY = {
    # errors and types: plain values
    "model/arrays.py": "cluster/planner/test_group_plan.py",
    "model/errors.py": "model/test_weights.py",
    "serving/errors.py": "serving/ingress/test_openai_http.py",             # each has a status
    "cluster/planner/layer/error.py": "cluster/planner/layer/test_problem.py",

    # what a model computes: against transformers, and for bit-identity
    "model/attention.py": "oracle/test_transformers.py",
    "model/decoder.py": "oracle/test_transformers.py",
    "model/delta_net.py": "oracle/test_transformers.py",
    "model/moe.py": "oracle/test_transformers.py",
    "model/kernels/protocol.py": "model/kernels/test_packed_cpu.py",
    "model/kernels/packed_rows.py": "model/kernels/test_packed_cpu.py",
    "model/kernels/packed_weights.py": "model/kernels/test_packed_cpu.py",
    "model/kernels/composed_attention.py": "model/kernels/test_packed_blocks.py",
    "model/kernels/composed_delta_net.py": "model/kernels/test_packed_blocks.py",
    "model/kernels/torch_attention.py": "model/kernels/test_torch_kernels.py",

    # dispatchers: all against the local one
    "model/dispatch/all_to_all.py": "model/dispatch/test_dispatcher.py",
    "model/dispatch/gather.py": "model/dispatch/test_dispatcher.py",
    "model/dispatch/exchange.py": "model/dispatch/test_dispatcher.py",
    "model/dispatch/carriers.py": "model/dispatch/test_dispatcher.py",
    "model/dispatch/collectives.py": "model/dispatch/test_dispatcher.py",
    "model/dispatch/compiled_row_planner.py": "model/dispatch/test_row_planner.py",
    "model/dispatch/silent_group.py": "model/dispatch/test_auto.py",
    # one connection is made by all of them
    "model/transport/address.py": "model/transport/test_endpoint.py",
    "model/transport/peer_error.py": "model/transport/test_group.py",
    "model/probe_work.py": "model/test_device_probe.py",
    "model/curve.py": "cluster/planner/costs/test_device_curves.py",

    # parts of one way of a request
    "serving/ingress/build_request.py": "serving/ingress/test_openai_http.py",
    "serving/ingress/http_request.py": "serving/ingress/test_openai_http.py",
    "serving/ingress/logprobs.py": "serving/ingress/test_openai_http.py",
    "serving/ingress/openai_completions.py": "serving/ingress/test_openai_http.py",
    "serving/ingress/openai_responses.py": "serving/ingress/test_openai_http.py",
    "serving/ingress/openai_schema.py": "serving/ingress/test_openai_http.py",
    "serving/ingress/grpc_messages.py": "serving/ingress/test_grpc_server.py",
    "serving/router/generation.py": "serving/router/test_service.py",
    "serving/router/open_request.py": "serving/router/test_service.py",
    "serving/router/shard_links.py": "serving/router/test_service.py",
    "serving/link/channel_options.py": "serving/link/test_server.py",
    "serving/link/client.py": "serving/link/test_server.py",

    # parts of one plan
    "cluster/planner/placed_layers.py": "cluster/planner/test_placement.py",
    "cluster/planner/placement_plan.py": "cluster/planner/test_placement.py",
    "cluster/planner/plan_rules.py": "cluster/planner/test_group_plan.py",
    "cluster/planner/role_fit.py": "cluster/planner/test_member_roles.py",
    "cluster/planner/layer/linear_program.py": "cluster/planner/layer/test_exact.py",
    "cluster/planner/layer/rounding.py": "cluster/planner/layer/test_greedy.py",

    # what needs Ray, or a service that runs
    "cluster/deployments.py": "e2e/test_generation.py",
    "cluster/coordinator/handle.py": "e2e/test_generation.py",
    "cluster/coordinator/view.py": "cluster/coordinator/test_coordinator.py",         # plain values
    "cluster/shard/epoch_run.py": "cluster/shard/test_shard.py",            # real shards through several epochs
    "cluster/shard/parts.py": "cluster/shard/test_shard.py",
    "cluster/shard/preparation.py": "cluster/shard/test_shard.py",
    "cluster/shard/registered_shard.py": "cluster/shard/test_shard.py",
    "cluster/device/facts.py": "cluster/shard/test_loaded_model.py",
    "cluster/device/backend.py": "cluster/shard/test_process_group.py",
    "cluster/launch/local_nodes.py": "e2e/test_operations.py",
    "cluster/cli/placement_commands.py": "e2e/test_placement.py",
}
