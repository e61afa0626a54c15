"""The census: which adapters are served exactly, which are refused, and which would be served wrong, by family.

    python -m tests.census                       # everything, and docs/adapters.md is written (7 minutes)
    python -m tests.census --section dora --families llama gemma2
    python -m tests.census --rows 'v4|router' --out /tmp/page.md --json /tmp/cells.json

A row is a way to make an adapter, a column a family, a cell what came of it (measure.py). Adapters are made by PEFT or
written by hand, and what is right is computed by PEFT or merged by hand: the code under test has no part in either.
"""
