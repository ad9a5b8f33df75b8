"""Imported once by the fork server, so that a rank starts in a fraction of a second."""

from __future__ import annotations

import logging

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # compiles for seconds
import torch
from transformers import T5EncoderModel, T5Tokenizer

import launch.train_dit
import launch.train_vae

torch.set_num_threads(1)
logging.getLogger(deepspeed.__name__).setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

__all__ = ["T5EncoderModel", "T5Tokenizer", "launch"]
