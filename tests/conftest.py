import os

# before torch is imported anywhere: tests never reach for a hub, and tiny operations are far faster on one thread
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

# without a GPU kernels run in Triton's interpreter; its decorator decides when a kernel's module is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# the same examples in every CI run: what a new one finds is for whoever runs them by hand, not for somebody's merge
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
