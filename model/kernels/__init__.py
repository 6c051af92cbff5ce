"""Computes what a device must: packed C and plain torch behind one protocol. May import: errors."""
