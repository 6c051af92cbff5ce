"""The HTTP door: the app and its routes, and the wire below them.

May import: ingress, ingress.http.ui, ingress.openai, ingress.anthropic, ingress.responses, ingress.batches, batches,
router, text, tenants.
"""
