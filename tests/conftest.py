import os

# before torch is imported anywhere: tests never reach for a hub, and tiny operations are far faster on one thread
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
