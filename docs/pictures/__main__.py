"""Draw all pictures again: python -m docs.pictures"""

from docs.pictures import adapter_counts, arena, drawing, processes

PICTURES = {"processes.svg": processes.draw, "arena.svg": arena.draw, "adapter_counts.svg": adapter_counts.draw}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        drawing.write(name, draw())
