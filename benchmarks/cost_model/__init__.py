"""What a step should take on a GPU, from its bytes, operations and launches: before and after a change of design.

Without a GPU. Every number that goes in is named in inputs.py and designs.py, with where it is from.

    python -m benchmarks.cost_model            print the tables
    python -m benchmarks.cost_model --write    and keep them in benchmarks/results/cost_model.md
    python -m benchmarks.cost_model --chip H100

It knows no cache but by L2's rate, no clock that throttles, and no kernel that is worse than meant. It says which part
of a step is worth work, and which assumption a measurement (benchmarks/gpu) that differs has refuted.
"""
