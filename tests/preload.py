"""Imported once by the fork server, so that a rank starts in a fraction of a second."""

from __future__ import annotations

import logging

import deepspeed
import torch

torch.set_num_threads(1)
logging.getLogger(deepspeed.__name__).setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
