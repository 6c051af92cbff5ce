"""What all doors share: who asks, bounds of what is sent, prompts, tools, formats, and the one table of errors.

May import: router, text, text.answers, engine, tenants.
"""
