"""Encode a shard set once: python launch/encode.py --config FILE --out SHARDS"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.data.loader import read_sample
from cogvideo_dist.data.plan import assign_size
from cogvideo_dist.data.shards import DataError, ShardReader, read_index, write_shards
from cogvideo_dist.protocols import Defect, Sample, Slot
from cogvideo_dist.tasks.video import FrozenModels
from launch.compose import load_text, load_vae
from launch.environment import config_parser, run_command, split_config


def main() -> None:
    parser = config_parser(
        "Encode a shard set of videos and images to latents (posterior mean and log-variance) and text features, so that "
        "training needs neither VAE nor T5. Clips are taken from their beginning and cropped at the centre.",
        "python launch/encode.py --config configs/demo/dit.yaml --out runs/demo/latents",
    )
    parser.add_argument("--out", required=True, help="folder of the new shard set; it must not exist")
    options = parser.parse_args()
    files, overrides = split_config(options.config)
    config = load_config(DiTRun, files, overrides)
    if config.data.source != "pixels":
        raise ConfigError("data.source must be pixels, which are what this command encodes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = load_vae(config.frozen.vae or "", device)
    frozen = FrozenModels(
        vae.config.scaling_factor, vae, config.frozen.vae_semantics,
        load_text(config.frozen.text or "", config.model.transformer(), device),
    )  # fmt: skip
    written = write_shards(options.out, entries(config, frozen))
    print(f"{written.samples} samples encoded into {options.out}, {written.rejected} could not be used")


def entries(config: DiTRun, frozen: FrozenModels) -> Iterator[tuple[str, Mapping[str, bytes], Mapping[str, Any]] | Defect]:
    """Every clip of the shards in the form that ``write_shards`` takes, or what was wrong with it."""
    reader = ShardReader(config.data.shards)
    assert frozen.vae is not None
    origin = {
        "vae": weights_digest(frozen.vae), "semantics": frozen.vae_semantics, "scaling_factor": frozen.latent_scale,
        "fps": config.data.fps,
    }  # fmt: skip
    for index, record in enumerate(tqdm(read_index(config.data.shards), unit="clip")):
        size = assign_size(record, config.data)
        if isinstance(size, str):
            yield Defect(record.key, record.source, size)
            continue
        try:
            slot = Slot(0, index, size)
            sample = read_sample(reader, record, slot, seed=config.run.seed, fps=config.data.fps, crop="center")
        except DataError as error:
            yield Defect(error.key, error.source, error.reason)
            continue
        facts = {
            "source": record.source, "kind": "latent", "frames": size[0], "fps": config.data.fps, "height": size[1],
            "width": size[2], "caption_length": record.caption_length, "size": size, "origin": origin,
        }  # fmt: skip
        yield record.key, members(sample, frozen), facts


@torch.no_grad()
def members(sample: Sample, frozen: FrozenModels) -> dict[str, bytes]:
    assert sample.pixels is not None and frozen.vae is not None and frozen.text is not None
    weight = next(frozen.vae.parameters())
    video = sample.pixels.to(weight.device).permute(3, 0, 1, 2)[None].to(weight.dtype) / 127.5 - 1
    posterior = frozen.vae.encode(video, semantics=frozen.vae_semantics)
    text = frozen.text.encode([sample.caption])[0]
    moments = {"mean": posterior.mean[0].cpu().contiguous(), "logvar": posterior.logvar[0].cpu().contiguous()}
    return {
        "latent.safetensors": save(moments),
        "text.safetensors": save({"text": text.cpu().contiguous()}),
        "txt": sample.caption.encode(),
    }


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    run_command("encode", main)
