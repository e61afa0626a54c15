"""Where kernel tests run: on the GPU if there is one, else in Triton's interpreter on the CPU."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
