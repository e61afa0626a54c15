"""HTTP in, SSE out. Knows no tensors.

Read completions.py for a request's way through; generation.py turns it into tokens and text.
"""
