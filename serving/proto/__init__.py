"""Modules made of the .proto files beside this one. May import: nothing of serving."""
