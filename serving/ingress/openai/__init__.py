"""OpenAI's API: bodies of clients -> requests, and deltas -> answers and streams, field by field.

May import: ingress, router, engine, text, text.answers.
"""
