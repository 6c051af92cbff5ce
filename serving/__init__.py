"""Requests: from the body that a client sends to the plan of a step. Knows no Ray and no torch.

May import: nothing of serving. Every room may import: config, option_types, errors, sampling_params, priority,
metrics, supervision, token_ids.
"""
