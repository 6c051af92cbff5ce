"""What a device computes: packed C and plain torch behind one protocol. May import: errors."""
