"""What adapter bytes are on the device now: the paged weight manager.

residency.py decides, transfer.py moves, tables/ own the memory of the parts and what kernels read of them, arena.py
maps pages under them. kv_memory.py is where keys and values lie.
"""
