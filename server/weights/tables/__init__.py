"""The parts of adapters on the device: a table for each kind of part.

A table owns the memory of its parts and what kernels read of them. Residency knows tables, not kinds (table.py says
what it asks of them); server/assembly.py lists which there are.
"""
