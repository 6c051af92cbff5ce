"""Modules without a test file of their own name, each with the test that covers it on purpose.

A module with logic of its own gets tests/<same path>/test_<name>.py; here stand those that only others can show: parts
of one protocol, plain values, what needs a running cluster. Paths of tests are below tests/.
"""

from __future__ import annotations

COVERED_BY = {
    # errors and types: plain values
    "model/arrays.py": "cluster/planner/test_group_plan.py",
    "model/errors.py": "model/test_weights.py",
    "serving/errors.py": "serving/ingress/http/test_app.py",             # each has a status
    "serving/router/wrapped_service.py": "serving/router/test_metered_service.py",
    "serving/option_types.py": "serving/test_config.py",
    "serving/engine/sequence_caches.py": "serving/engine/test_scheduler.py",
    "serving/tls/contexts.py": "serving/tls/test_identity.py",
    "serving/tls/door_context.py": "serving/ingress/http/test_server.py",
    "cluster/planner/layer/error.py": "cluster/planner/layer/test_problem.py",
    "cluster/coordinator/leave_orders.py": "cluster/coordinator/test_coordinator.py",
    "cluster/autoscaler/fleet.py": "cluster/autoscaler/test_policy.py",
    "cluster/whatif/trace/stock_scaler.py": "cluster/whatif/trace/test_scalers.py",
    "cluster/whatif/trace/trace_page.py": "cluster/whatif/trace/test_trace_answer.py",
    "cluster/whatif/trace/trace_pictures.py": "cluster/whatif/trace/test_trace_answer.py",
    "cluster/whatif/trace/trace_text.py": "cluster/whatif/trace/test_trace_answer.py",

    # what a model computes: against transformers, and for bit-identity
    "model/attention.py": "oracle/test_transformers.py",
    "model/decoder.py": "oracle/test_transformers.py",
    "model/delta_net.py": "oracle/test_transformers.py",
    "model/moe.py": "oracle/test_transformers.py",
    "model/kernels/call_threads.py": "model/kernels/test_packed_cpu.py",
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
    "serving/ingress/build_request.py": "serving/ingress/http/test_app.py",
    "serving/ingress/http/request.py": "serving/ingress/http/test_app.py",
    "serving/ingress/endpoint.py": "serving/ingress/http/test_app.py",
    "serving/ingress/http/door.py": "serving/ingress/http/test_app.py",
    "serving/ingress/http/errors.py": "serving/ingress/http/test_app.py",
    "serving/ingress/http/openai_paths.py": "serving/ingress/http/test_app.py",
    "serving/ingress/http/own_paths.py": "serving/ingress/http/test_app.py",
    "serving/ingress/http/anthropic_paths.py": "serving/ingress/anthropic/test_messages.py",
    "serving/ingress/http/responses_paths.py": "serving/ingress/responses/test_endpoint.py",
    "serving/ingress/http/files_paths.py": "serving/ingress/batches/test_files.py",
    "serving/ingress/http/batches_paths.py": "serving/ingress/batches/test_batches.py",
    "serving/ingress/batches/batch_types.py": "serving/ingress/batches/test_batches.py",
    "serving/ingress/batches/line_worker.py": "serving/ingress/batches/test_batches.py",
    "serving/ingress/batches/file_types.py": "serving/ingress/batches/test_files.py",
    "serving/ingress/responses/answers.py": "serving/ingress/responses/test_endpoint.py",
    "serving/ingress/responses/bodies.py": "serving/ingress/responses/test_endpoint.py",
    "serving/ingress/responses/chats.py": "serving/ingress/responses/test_endpoint.py",
    "serving/ingress/responses/item_events.py": "serving/ingress/responses/test_endpoint.py",
    "serving/ingress/anthropic/bodies.py": "serving/ingress/anthropic/test_chats.py",
    "serving/ingress/anthropic/answers.py": "serving/ingress/anthropic/test_messages.py",
    "serving/ingress/openai/logprobs.py": "serving/ingress/http/test_app.py",
    "serving/ingress/openai/completions.py": "serving/ingress/http/test_app.py",
    "serving/ingress/openai/answers.py": "serving/ingress/http/test_app.py",
    "serving/ingress/tagged_call_grammar.py": "serving/ingress/test_tool_grammar.py",
    "serving/ingress/chat_request.py": "serving/ingress/test_tools.py",
    "serving/ingress/chat_answer.py": "serving/ingress/test_tools.py",
    "serving/ingress/openai/chat_stream.py": "serving/ingress/test_tools.py",
    "serving/ingress/openai/chat_message.py": "serving/ingress/test_tools.py",
    "serving/ingress/openai/usage.py": "serving/ingress/http/test_app.py",
    "serving/ingress/caller.py": "serving/ingress/http/test_app.py",
    "serving/text/answers/parts.py": "serving/text/answers/test_answer_parser.py",
    "serving/text/answers/stream_reader.py": "serving/text/answers/test_answer_parser.py",
    "serving/text/answers/call_json.py": "serving/text/answers/test_answer_parser.py",
    "serving/text/answers/call_writer.py": "serving/text/answers/test_answer_parser.py",
    "serving/text/answers/hermes.py": "serving/text/answers/test_answer_parser.py",
    "serving/text/answers/mistral.py": "serving/text/answers/test_answer_parser.py",
    "serving/text/answers/qwen3_coder.py": "serving/text/answers/test_answer_parser.py",
    "serving/text/answers/reasoning.py": "serving/text/answers/test_answer_parser.py",
    "serving/text/answers/answer_format.py": "serving/text/answers/test_answer_parser.py",
    "serving/ingress/openai/bodies.py": "serving/ingress/http/test_app.py",
    "serving/engine/block_names.py": "serving/engine/test_scheduler.py",
    "serving/tracing/request_trace.py": "serving/tracing/test_tracer.py",
    "serving/router/generation.py": "serving/router/test_service.py",
    "serving/router/open_request.py": "serving/router/test_service.py",
    "serving/tenants/schema.py": "serving/tenants/test_database.py",
    "serving/tenants/usage_by.py": "serving/tenants/test_usage.py",
    "serving/tenants/usage_reader.py": "serving/ingress/test_usage.py",
    "serving/tenants/migrations/m0001_keys.py": "serving/tenants/test_database.py",
    "serving/tenants/migrations/m0002_usage.py": "serving/tenants/test_database.py",
    "serving/tenants/migrations/m0003_responses.py": "serving/tenants/test_database.py",
    "serving/tenants/migrations/m0004_usage_days.py": "serving/tenants/test_database.py",
    "serving/tenants/migrations/m0005_priority.py": "serving/tenants/test_database.py",
    "serving/tenants/migrations/m0006_files.py": "serving/tenants/test_database.py",
    "serving/tenants/migrations/m0007_batches.py": "serving/tenants/test_database.py",
    "serving/tenants/migrations/m0008_weight.py": "serving/tenants/test_database.py",
    "serving/batches/page.py": "serving/batches/test_file_store.py",
    "serving/batches/stored_file.py": "serving/batches/test_file_store.py",
    "serving/link/client.py": "serving/link/test_server.py",
    "serving/link/block_link.py": "cluster/shard/test_block_exchange.py",       # with caches behind both ends
    "serving/link/block_receiver.py": "cluster/shard/test_block_exchange.py",
    "serving/link/block_sender.py": "cluster/shard/test_block_exchange.py",

    # parts of one plan
    "cluster/planner/placed_layers.py": "cluster/planner/test_placement.py",
    "cluster/planner/placement_plan.py": "cluster/planner/test_placement.py",
    "cluster/planner/plan_rules.py": "cluster/planner/test_group_plan.py",
    "cluster/planner/role_fit.py": "cluster/planner/test_member_roles.py",
    "cluster/planner/layer/linear_program.py": "cluster/planner/layer/test_exact.py",
    "cluster/planner/layer/rounding.py": "cluster/planner/layer/test_greedy.py",

    # what needs Ray, or a service that runs
    "cluster/deployments.py": "e2e/test_generation.py",
    "cluster/coordinator/group_rules.py": "e2e/test_generation.py",
    "cluster/coordinator/handle.py": "e2e/test_generation.py",
    "cluster/coordinator/regroup.py": "cluster/coordinator/test_membership.py",     # the decisions that it is part of
    "cluster/coordinator/reports.py": "cluster/coordinator/test_membership.py",     # plain values
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
