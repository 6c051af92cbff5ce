"""How rows reach experts and come back: the protocol, its local reference, all-to-all, gather.

May import: kernels, arrays, errors, pace, placement.
"""
