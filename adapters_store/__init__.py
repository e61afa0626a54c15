"""What an adapter *is*: formats on disk, verification, and the catalogue of names.

Knows nothing of requests, devices or HTTP, and imports no torch.
"""
