"""Encode a shard set once: python launch/encode.py --config FILE --out SHARDS"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from tqdm import tqdm

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.data.loader import read_sample
from cogvideo_dist.data.plan import assign_size
from cogvideo_dist.data.shards import DataError, ShardReader, read_index, write_shards
from cogvideo_dist.models.text import TextEncoder
from cogvideo_dist.models.vae import VAE, Semantics
from cogvideo_dist.protocols import Defect, Sample, Slot
from cogvideo_dist.tasks.pixels import to_video
from launch.compose import cut_captions, load_text, load_vae, weights_digest
from launch.environment import config_parser, run_command, split_config


def main() -> None:
    parser = config_parser(
        "Encode a shard set of videos and images to latents (posterior mean and log-variance) and text features, so that "
        "training needs neither VAE nor T5. Clips are taken from their beginning and cropped at the centre.",
        "python launch/encode.py --config configs/demo/dit.yaml --out runs/demo/latents",
    )
    parser.add_argument("--out", required=True, help="folder of the new shard set; it must not exist")
    options = parser.parse_args()
    config = load_config(DiTRun, **split_config(options.config))
    if config.data.source != "pixels":
        raise ConfigError("data.source must be pixels, which are what this command encodes")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = Encoders(
        load_vae(config.frozen.vae or "", device),
        load_text(config.frozen.text or "", config.model.transformer(), device=device),
    )
    written = write_shards(options.out, entries(config, encoders))
    print(f"{written.samples} samples encoded into {options.out}, {written.rejected} could not be used")
    cut = cut_captions(read_index(options.out))
    if cut:
        print(
            f"{len(cut)} captions were cut; runs list them in data_report.jsonl; first: {cut[0].source}: {cut[0].reason}"
        )


class Encoders(NamedTuple):
    vae: VAE
    text: TextEncoder


def entries(
    config: DiTRun, encoders: Encoders
) -> Iterator[tuple[str, Mapping[str, bytes], Mapping[str, Any]] | Defect]:
    """Every clip of the shards in the form that ``write_shards`` takes, or what was wrong with it."""
    reader = ShardReader(config.data.shards)
    origin = {
        "vae": weights_digest(encoders.vae), "semantics": config.frozen.vae_semantics,
        "scaling_factor": encoders.vae.config.scaling_factor, "fps": config.data.fps,
        "text_length": encoders.text.length, "text_dim": encoders.text.dim,
    }  # fmt: skip
    for index, record in enumerate(tqdm(read_index(config.data.shards), unit="clip")):
        size = assign_size(record, config.data)
        if isinstance(size, str):
            yield Defect(record.key, record.source, size)
            continue
        try:
            slot = Slot(0, index, size)
            sample = read_sample(reader, record, slot=slot, seed=config.run.seed, fps=config.data.fps, crop="center")
        except DataError as error:
            yield Defect(error.key, error.source, error.reason)
            continue
        facts = {
            "source": record.source, "kind": "latent", "frames": size[0], "fps": config.data.fps, "height": size[1],
            "width": size[2], "caption_length": record.caption_length, "size": size,
            "origin": {**origin, "caption_tokens": encoders.text.token_count(sample.caption)},
        }  # fmt: skip
        yield record.key, members(sample, encoders, semantics=config.frozen.vae_semantics), facts


@torch.no_grad()
def members(sample: Sample, encoders: Encoders, *, semantics: Semantics) -> dict[str, bytes]:
    vae, text = encoders
    posterior = vae.encode(to_video([sample], next(vae.parameters())), semantics=semantics)
    features = text.encode([sample.caption])[0]
    moments = {"mean": posterior.mean[0].cpu().contiguous(), "logvar": posterior.logvar[0].cpu().contiguous()}
    return {
        "latent.safetensors": save(moments),
        "text.safetensors": save({"text": features.cpu().contiguous()}),
        "txt": sample.caption.encode(),
    }


if __name__ == "__main__":
    run_command("encode", main)
