"""OpenAI's Files and Batch APIs: uploads, batches, and the answers to their lines.

May import: ingress, ingress.openai, ingress.responses, batches, router, text, tenants.
"""
