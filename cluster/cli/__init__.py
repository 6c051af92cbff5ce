"""The commands of `moesaic`, their tables and their progress. May import: every folder of cluster."""
