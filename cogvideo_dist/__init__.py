"""Distributed training of CogVideoX-class text-to-video diffusion models."""

__version__ = "0.1.0"
