"""How consumers of a Delta launch: pending/kernel.py."""
