"""What is done between the two products of an expert: gate, up -> act(gate) * up, element by element.

gate_up does it before it stores its products. Where something is added to those products first (LoRA), gate_up stores
them as they are, and `activate` is a launch of its own.
"""
