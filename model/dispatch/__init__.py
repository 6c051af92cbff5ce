"""Brings rows to experts and their outputs back: the protocol, its local reference, all-to-all, gather.

May import: kernels, transport, arrays, errors, host_threads, pace, placement.
"""
