import os

# before torch is imported anywhere: tests never reach for a hub, and tiny operations are far faster on one thread
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# the same examples in every CI run: what a new one finds is for whoever runs them by hand, not for somebody's merge
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
