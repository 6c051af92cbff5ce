"""OpenAI's Responses API: bodies of clients -> chats, deltas -> items and events, and the responses that are kept.

May import: ingress, router, engine, tenants, text, text.answers.
"""
