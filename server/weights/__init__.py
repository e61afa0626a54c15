"""What adapter bytes are on the device now: the paged weight manager.

residency.py decides, transfer.py moves, lora_slabs.py and expert_stacks.py own the memory and the tables that kernels
read, arena.py maps pages under them.
"""
