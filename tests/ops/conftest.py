"""Without a GPU, Triton's kernels run in its interpreter; it looks at the variable when a kernel is defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
