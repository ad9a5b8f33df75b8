from __future__ import annotations

import os

# Before torch is imported: an OpenMP pool of several threads does not survive the forks that loaders and ranks make.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
