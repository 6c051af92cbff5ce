"""Spans of requests, sent by OTLP: what a request waited for and what computed it, never what it says. OpenTelemetry is
loaded only where a config asks for it.

May import: nothing of serving.
"""
