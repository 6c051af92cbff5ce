"""A model's output -> reasoning, content and tool calls, piece by piece. May import: nothing of serving."""
