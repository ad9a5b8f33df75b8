"""Kernels that a run may use, tried for launch/doctor.py in a process of its own: python launch/doctor_kernels.py --device cpu

A kernel that does not compile, crashes or spoils the device's context ends this process and no other. Each is compared, output
and gradients, with a plain computation in float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from cogvideo_dist.config.schema import AttentionName
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import tiny
from cogvideo_dist.pack.attention import Backend, backend_for
from cogvideo_dist.pack.layout import Clip, PackLayout, groups_of
from cogvideo_dist.pack.patch import patchify
from cogvideo_dist.pack.shard import SequenceShard
from cogvideo_dist.rng import fold
from launch.doctor_check import OWN, Finding, examined, told

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Of the largest difference, relative to the largest element, after a few operations and their backward."""

LENGTHS = (48, 48, 33, 7)
HEADS, HEAD_DIM = 3, 64

LIMIT_S = 120.0
"""Of one kernel; a compiler of C++ takes most of it the first time."""

Triple = tuple[Tensor, Tensor, Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    device = torch.device(parser.parse_args(arguments).device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    json.dump([asdict(finding) for finding in kernels(device)], sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # what hangs in a thread is not waited for


def in_a_child(device: torch.device, *, limit_s: float) -> list[Finding]:
    """What ``kernels`` finds there."""
    check, remedy = "kernels", "run `python launch/doctor_kernels.py --device` with that device to see it alone"
    paths = [str(OWN), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, str(OWN / "launch" / "doctor_kernels.py"), "--device", str(device)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        return [Finding.of(each) for each in json.loads(done.stdout.splitlines()[-1])]
    except subprocess.TimeoutExpired:
        return [Finding(check, "fail", f"no answer in {limit_s:g} s", "all are tried by then", remedy)]
    except (ValueError, IndexError):
        said = told(RuntimeError(done.stderr.strip().rpartition("\n")[2] or "without a word"))
        return [Finding(check, "fail", f"the process ended with code {done.returncode}: {said}", "code 0", remedy)]


def kernels(device: torch.device) -> list[Finding]:
    """Everything optional that a run may choose, and what every run uses."""
    tried: dict[str, Callable[[], list[Finding]]] = {
        f"kernels: attention {name}": partial(attention, name, device)
        for name in get_args(AttentionName)
        if name != "auto"
    }
    tried["kernels: transformer"] = partial(transformer, device)
    tried["kernels: triton"] = partial(triton, device)
    tried["kernels: apex"] = partial(apex, device)
    return [finding for name, check in tried.items() for finding in examined(name, check, limit_s=LIMIT_S)]


def attention(name: str, device: torch.device, *, backend: Backend | None = None) -> list[Finding]:
    """A back end of ``parallel.attention`` over a pack of clips, in both precisions; ``backend`` stands in for it."""
    check = f"kernels: attention {name}"
    errors, refusals = {}, []
    for dtype in BOUNDS:
        try:
            chosen = backend or backend_for(name, device=device, dtype=dtype)
        except ValueError as error:
            refusals.append(_reason(error, device))
            continue
        errors[dtype] = _attention_error(chosen, device, dtype)
    return [agreement(check, errors) if errors else Finding(check, "skipped", refusals[-1])]


def _reason(error: ValueError, device: torch.device) -> str:
    said = told(error).partition(";")[0].removeprefix("parallel.attention ")
    on_cpu = device.type == "cpu" and ("does not run on cpu" in said or "16 bits" in said)
    return "no GPU" if on_cpu and "not installed" not in said else said


def _attention_error(backend: Backend, device: torch.device, dtype: torch.dtype) -> float:
    q, k, v, grad = drawn(4, (sum(LENGTHS), HEADS, HEAD_DIM), dtype=dtype)
    groups = groups_of(LENGTHS, LENGTHS)
    there: Triple = (q.to(device), k.to(device), v.to(device))
    attended = backend.attend(there, groups)
    gradients = backend.attend_backward(grad.to(device), attended, qkv=there, groups=groups)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = plain_attention(*leaves)
    return worst((attended.out, *gradients), (expected, *torch.autograd.grad(expected, leaves, grad.double())))


def plain_attention(*qkv: Tensor) -> Tensor:
    """By its definition, clip after clip, [n, heads, dim]."""
    parts = []
    for q, k, v in zip(*(x.split(list(LENGTHS)) for x in qkv)):
        scores = torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5
        parts.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(parts)


def transformer(device: torch.device) -> list[Finding]:
    """Two layers, forward and backward, on the device as it is trained and in float64 on the CPU."""
    config = tiny("cogvideox-5b")
    reference = DiT(config).double()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=fold(0, "doctor", name)))
    expected = _transformer_gradients(reference, torch.device("cpu"), torch.float64)
    errors = {}
    for dtype in BOUNDS:
        model = DiT(config)
        model.load_state_dict(reference.state_dict())
        found = _transformer_gradients(model.to(device, dtype), device, dtype)
        errors[dtype] = (found - expected).norm().item() / expected.norm().item()
    return [agreement("kernels: transformer", errors)]


def _transformer_gradients(model: DiT, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Velocity and all gradients of two clips, one vector in float64."""
    config = model.config
    latents = torch.randn(2, 3, config.in_channels, 8, 8, generator=fold(0, "latents"))
    text = torch.randn(2 * config.text_length, config.text_dim, generator=fold(0, "text"))
    frames, height, width = 3 // config.patch[0], 8 // config.patch[1], 8 // config.patch[2]
    seq = SequenceShard(PackLayout((Clip(config.text_length, (frames, height, width)),) * 2))
    vision = patchify(latents, config.patch).flatten(0, 1)
    velocity = model(
        vision.to(device, dtype), text.to(device, dtype), timestep=torch.tensor([100, 900], device=device), seq=seq
    )
    velocity.square().mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([x.detach().flatten().double().cpu() for x in (velocity, *gradients)])


def triton(device: torch.device, kernel: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[Finding]:
    """Whether Triton compiles a kernel that computes what it should; ``kernel`` stands in for ours."""
    check = "kernels: triton"
    if kernel is None:
        if device.type != "cuda":
            return [Finding(check, "skipped", "no GPU")]
        if importlib.util.find_spec("triton") is None:
            return [Finding(check, "skipped", "triton is not installed")]
        from launch.doctor_triton import affine  # it takes the library to define it

        kernel = affine
    errors = {}
    for dtype in BOUNDS:
        x, scale = (each.to(device) for each in drawn(2, (3000,), dtype=dtype))
        errors[dtype] = worst([kernel(x, scale)], [x.double() * scale.double() + x.double()])
    return [agreement(check, errors)]


def apex(device: torch.device) -> list[Finding]:
    """NVIDIA's layer norm, where it is installed. The registry's package of that name is another program."""
    check = "kernels: apex"
    if importlib.util.find_spec("apex") is None:
        return [Finding(check, "skipped", "not installed, and never required")]
    if importlib.util.find_spec("apex.normalization") is None:
        said = "the package named apex here is not NVIDIA's"
        return [Finding(check, "warn", said, "NVIDIA's, or none", "pip uninstall apex; it is never required")]
    if device.type != "cuda":
        return [Finding(check, "skipped", "no GPU")]
    norm = importlib.import_module("apex.normalization").FusedLayerNorm(256).to(device)
    errors = {}
    for dtype in BOUNDS:
        x = drawn(1, (64, 256), dtype=dtype)[0].to(device)
        expected = torch.nn.functional.layer_norm(x.double(), (256,))
        errors[dtype] = worst([norm.to(dtype)(x)], [expected])
    return [agreement(check, errors)]


def drawn(count: int, shape: Sequence[int], *, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Normal numbers that are exact in bfloat16, so that every precision begins with the same."""
    generator = fold(seed, "doctor")
    return [torch.randn(*shape, generator=generator).bfloat16().to(dtype) for _ in range(count)]


def worst(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference over the largest element; not a number if one of them is none."""
    errors = [
        ((a.detach().double().cpu() - b.detach().double().cpu()).abs().max() / b.detach().abs().max().cpu()).item()
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.tensor(errors).max())


def agreement(check: str, errors: dict[torch.dtype, float]) -> Finding:
    """``errors``: by precision."""
    words = {dtype: str(dtype).removeprefix("torch.") for dtype in errors}
    wrong = [dtype for dtype, error in errors.items() if not error <= BOUNDS[dtype]]
    said = ", ".join(f"{words[dtype]} off by {error:.1e}" for dtype, error in errors.items())
    expected = ", ".join(f"{words[dtype]} at most {BOUNDS[dtype]:g}" for dtype in errors)
    if wrong:
        choice = check.removeprefix("kernels: attention ")
        other = (
            f"choose another parallel.attention than {choice}"
            if choice != check
            else "install torch for this driver and GPU"
        )
        return Finding(check, "fail", f"wrong numbers: {said}", expected, f"{other}; do not train with it")
    return Finding(check, "pass", said, expected)


if __name__ == "__main__":
    main()
