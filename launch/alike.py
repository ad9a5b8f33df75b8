"""What the ranks of a run must have alike."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import cogvideo_dist
import launch
from cogvideo_dist.config.load import plain
from cogvideo_dist.engine.manifest import flat
from cogvideo_dist.engine.zero import DEEPSPEED

VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "PYTHONHASHSEED",
)  # fmt: skip
"""Of the environment, those that change results or how ranks talk to each other."""


def alike(config: Any) -> dict[str, str]:
    """The configuration key by key, the code, versions, and what of the environment changes results."""
    facts = {key: json.dumps(value) for key, value in flat(plain(config)).items()}
    facts |= {
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": DEEPSPEED,
    }
    return facts | {f"environment variable {name}": os.environ.get(name, "unset") for name in VARIABLES}


def code_digest() -> str:
    """Of all Python files that take part; the beginning of a SHA-256."""
    digest = hashlib.sha256()
    for package in (cogvideo_dist, launch):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
