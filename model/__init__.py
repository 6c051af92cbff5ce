"""Tensors: what a model computes. Knows no Ray, asyncio, pydantic or gRPC. May import: dispatch, kernels."""
