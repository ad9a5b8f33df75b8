"""What torch's flight recorder knows of this process's collectives: for whoever has to say why a run stands still."""

from __future__ import annotations

import json
from typing import Any

import torch._C._distributed_c10d as c10d

RECORDS = "TORCH_FR_BUFFER_SIZE" if hasattr(c10d, "_dump_fr_trace_json") else "TORCH_NCCL_TRACE_BUFFER_SIZE"
"""The environment variable that says how many collectives are remembered. Read when process groups are made."""

LAST = 3
"""Collectives of a group that are told."""


def collectives() -> dict[str, dict[str, Any]]:
    """By process group: its ``label``, how many collectives it has begun here (``begun``), and the last ones, by number.

    Empty where torch does not record.
    """
    dump = getattr(c10d, "_dump_fr_trace_json", None) or getattr(c10d, "_dump_nccl_trace_json", None)
    if dump is None:
        return {}
    try:
        entries = json.loads(dump(True, False)).get("entries", [])
    except (RuntimeError, ValueError):
        return {}
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda each: each["record_id"]):
        name, label = entry["process_group"]
        label = {"default_pg": "world", "undefined": f"number {name}"}.get(label, label)
        group = found.setdefault(name, {"label": label, "begun": 0, "calls": {}})
        number = entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]
        operation = entry["profiling_name"].rpartition(":")[2]
        key = f"{'p' if entry['is_p2p'] else 'c'}{number}"
        group["calls"][key] = {
            "op": operation,
            "sizes": entry["input_sizes"],
            "dtypes": entry["input_dtypes"],
            "done": bool(entry["retired"]),
        }
        if not entry["is_p2p"]:
            group["begun"] = max(group["begun"], number)
    for group in found.values():
        group["calls"] = dict(list(group["calls"].items())[-LAST:])
    return found
