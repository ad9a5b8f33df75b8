"""Sample videos from prompts: python launch/sample.py --checkpoint RUN --prompt TEXT --out DIR"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import SPATIAL, DiTRun, Sampling
from cogvideo_dist.diffusion.guidance import GuidanceKind
from cogvideo_dist.diffusion.samplers import SamplerName
from cogvideo_dist.evaluation.media import to_uint8, write_contact_sheet, write_mp4
from launch.environment import run_command
from launch.runs import Pipeline, open_pipeline


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sample videos from a run or from a diffusers pipeline folder: an mp4 a prompt and a contact sheet.",
        epilog="example:\n  python launch/sample.py --checkpoint runs/demo/dit --prompt 'A cat turns its head.' --out runs/out",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a run's folder or a diffusers pipeline folder")
    parser.add_argument("--prompt", action="append", default=[], help="may be given several times")
    parser.add_argument("--prompts-file", help="UTF-8 text, one prompt a line")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="averaged or last weights of a run")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--guidance-kind", choices=get_args(GuidanceKind))
    parser.add_argument("--sampler", choices=get_args(SamplerName))
    parser.add_argument("--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--fps", type=float)
    parser.add_argument("--seed", type=int, help="of the first prompt; the next ones count up")
    parser.add_argument(
        "--vae-tiling", action=argparse.BooleanOptionalAction,
        help="decode in overlapping tiles, for less memory; left out, as the run's frozen.vae_tiling says",
    )  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = arguments()
    prompts = read_prompts(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = open_pipeline(options.checkpoint, options.weights, device=device)
    sampler = pipeline.sampler
    if options.vae_tiling is not None:
        sampler = replace(sampler, vae_tiling=options.vae_tiling)
    settings = sampling_settings(options, pipeline)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (prompt, text) in enumerate(zip(prompts, pipeline.text.encode(prompts))):
        begun = time.monotonic()
        with tqdm(total=settings.steps, desc=f"prompt {index + 1} of {len(prompts)}", unit="step") as bar:
            video = sampler.video(text, settings, seed=settings.seed + index, preview=lambda _step, _x0: bar.update())
        frames = to_uint8(video)
        path = out / f"prompt-{index:02d}.mp4"
        write_mp4(path, frames, settings.fps)
        rows.append((prompt, frames))
        print(
            f"{path}: {len(frames)} frames, seed {settings.seed + index}, {time.monotonic() - begun:.1f} s", flush=True
        )
    write_contact_sheet(out / "contact-sheet.png", rows)
    print(f"{out / 'contact-sheet.png'}")


def read_prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts_file:
        try:
            lines = Path(options.prompts_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts-file {options.prompts_file}: cannot be read as UTF-8 text: {error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError("give a prompt with --prompt or --prompts-file")
    return prompts


def sampling_settings(options: argparse.Namespace, pipeline: Pipeline) -> Sampling:
    """The run's own settings (or the model's base size), changed by what the command line gives."""
    config = Path(options.checkpoint) / "config.yaml"
    if config.exists():
        base = load_config(DiTRun, [config]).validation.sampling
    else:
        model = pipeline.sampler.model.config
        size = (4 * (model.sample_frames - 1) + 1, SPATIAL * model.sample_height, SPATIAL * model.sample_width)
        base = Sampling(size=size, fps=8.0 if model.patch[0] == 1 else 16.0)
    names = ("steps", "guidance", "guidance_kind", "sampler", "fps", "seed")
    given: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.size:
        given["size"] = tuple(options.size)
    return replace(base, **given)


if __name__ == "__main__":
    run_command("sample", main)
