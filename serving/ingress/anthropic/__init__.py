"""Anthropic's Messages API: bodies of clients -> chats, and deltas -> messages and events.

May import: ingress, router, engine, text, text.answers.
"""
