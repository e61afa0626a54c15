"""Which tokens run next. Torch-free: a seeded simulation drives all of it (tests/engine/test_simulation.py).

Read core.py first: its `step()` is the architecture; plan.py is the contract with whoever computes.
"""
