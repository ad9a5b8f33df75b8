"""The whole way on a small scale: clips, shards, autoencoder, transformer, sample, release. python launch/demo.py --out DIR"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.config.schema import Sampling
from launch.environment import run_command
from launch.runs import open_pipeline

ROOT = Path(__file__).resolve().parent.parent
RANKS = "2"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The whole way on a small scale: clips, shards, autoencoder, transformer, sample, release.",
        epilog="example:\n  python launch/demo.py --out runs/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", default="runs/demo", help="folder of everything that the demo makes")
    out = Path(parser.parse_args().out)
    begun = time.monotonic()
    os.environ.update(HF_HUB_OFFLINE="1", DIFFUSERS_VERBOSITY="error", TRANSFORMERS_VERBOSITY="error")
    paths = [f"data.shards={out / 'shards'}"]
    make_shards(out)
    make_text(out)
    vae, dit = out / "vae", out / "dit"
    stage("train a tiny autoencoder on 2 ranks with ZeRO-2")
    train("train_vae", ["configs/demo/vae.yaml"], overrides=[f"run.dir={vae}", *paths])
    python("launch/convert.py", "diffusers", vae, out / "vae-export")
    encoders = [f"frozen.vae={out / 'vae-export'}", f"frozen.text={out / 'text'}"]
    stage("look at the data: sizes, captions, packs, what is cut or dropped")
    config = ["--config", "configs/demo/dit.yaml", *paths, *encoders]
    python("data_tools/inspect_shards.py", *config, "--dp", RANKS, "--out", out / "data-report")
    stage("train a tiny transformer on 2 ranks with ZeRO-2")
    train("train_dit", ["configs/demo/dit.yaml"], overrides=[f"run.dir={dit}", *paths, *encoders])
    stage("sample a prompt")
    prompt = first_caption(out)
    python("launch/sample.py", "--checkpoint", dit, "--prompt", prompt, "--out", out / "sample")
    stage("export to diffusers, reload with CogVideoXPipeline and compare")
    python("launch/convert.py", "diffusers", dit, out / "pipeline")
    difference = compare(dit, out / "pipeline", prompt=prompt)
    report(out, difference=difference, seconds=time.monotonic() - begun)


def make_shards(out: Path) -> None:
    """Clips and shards; what an earlier start finished is kept."""
    stage("make 32 clips and images with captions, and pack them into shards")
    if not (out / "clips" / "labels").exists():
        python("data_tools/make_demo_clips.py", out / "clips")
    if not (out / "shards").exists():
        python("data_tools/make_shards.py", out / "clips", out / "shards")


def make_text(out: Path) -> None:
    if not (out / "text").exists():
        python("data_tools/make_demo_text.py", out / "clips" / "labels", out / "text", "--length", "64")


def stage(title: str) -> None:
    print(f"\n== {title}", flush=True)


def python(script: str, *arguments: str | Path) -> None:
    run([sys.executable, str(ROOT / script), *map(str, arguments)])


def train(script: str, configs: Sequence[str], *, overrides: list[str]) -> None:
    launcher = str(Path(sys.executable).parent / "deepspeed")
    run([launcher, "--num_gpus", RANKS, "--master_port", free_port(), str(ROOT / "launch" / f"{script}.py"), "--config",
         *(str(ROOT / config) for config in configs), *overrides])  # fmt: skip


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(command: list[str]) -> None:
    print("+", " ".join(command), flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=False).returncode
    if code:
        raise ConfigError(f"{Path(command[1]).name} ended with exit code {code}; its message is above")


def first_caption(out: Path) -> str:
    return sorted((out / "clips" / "labels").glob("*.txt"))[0].read_text(encoding="utf-8").strip()


def compare(run_folder: Path, pipeline_folder: Path, *, prompt: str) -> float:
    """Largest difference, in 0..1 of brightness, between our video and the public pipeline's from the same noise."""
    from diffusers import CogVideoXPipeline

    torch.set_grad_enabled(False)
    ours = open_pipeline(str(run_folder), "ema", device=torch.device("cpu"))
    settings = Sampling(steps=20, sampler="ddim", guidance=3.0, guidance_kind="constant", size=(17, 96, 96), fps=8)
    text = ours.text.encode([prompt])[0]
    noise = ours.sampler.initial_noise(settings, seed=0)
    latents = ours.sampler.latents(text, settings, noise=noise, draw=lambda index, shape: torch.zeros(shape))
    # The public pipeline decodes in chunks, and takes T5's features of "" as the unconditional ones unless told otherwise.
    public = CogVideoXPipeline.from_pretrained(pipeline_folder)
    public.set_progress_bar_config(disable=True)
    features, _ = public.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=ours.text.length)
    theirs = public(
        prompt_embeds=features, negative_prompt_embeds=torch.zeros_like(features), num_frames=17, height=96, width=96,
        num_inference_steps=20, guidance_scale=3.0, use_dynamic_cfg=False, latents=noise[None], output_type="pt",
        max_sequence_length=ours.text.length,
    ).frames[0]  # fmt: skip
    z = (latents / ours.sampler.latent_scale).transpose(0, 1)[None]
    mine = (ours.sampler.vae.decode(z, semantics="chunked")[0] / 2 + 0.5).clamp(0, 1).transpose(0, 1)
    return float((mine - theirs).abs().max())


def report(out: Path, *, difference: float, seconds: float) -> None:
    entries = [json.loads(line) for line in (out / "dit" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    held_out = [entry["held_out/loss"] for entry in entries if "held_out/loss" in entry]
    tail = losses[-5:]
    print(f"""
== done in {seconds / 60:.1f} minutes
training loss    first {losses[0]:.4f}   last {sum(tail) / len(tail):.4f}   (mean of the last {len(tail)} reports)
held-out loss    first {held_out[0]:.4f}   last {held_out[-1]:.4f}
largest difference between our video and CogVideoXPipeline's from the export: {difference:.2e} (of 1)
data report      {out / "data-report" / "report.html"}
video            {out / "sample" / "prompt-00.mp4"}
contact sheet    {out / "sample" / "contact-sheet.png"}
TensorBoard      tensorboard --logdir {out}
export           {out / "pipeline"}""")
    if held_out[-1] >= held_out[0] or difference > 1e-3:
        raise ConfigError("the demo did not behave: held-out loss must fall and the export must render the same video")


if __name__ == "__main__":
    run_command("demo", main)
