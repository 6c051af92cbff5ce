"""Computes what a model is made of, in tensors.

Knows no Ray, asyncio, pydantic or gRPC. May import: dispatch, kernels.
"""
