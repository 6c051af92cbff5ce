"""The gRPC door: messages of moesaic.v1 and their bounds, health.

May import: ingress, proto, router, text, text.answers, tenants.
"""
