"""Encode a shard set: python | torchrun | deepspeed  launch/encode.py --config FILE [key=value ...] --out SHARDS"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm

from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.data.decode import DecodeError
from cogvideo_dist.data.encoded import ADDRESSES, Clip, EncodedSet, Item, Role, SetPlan, address_of, read_set
from cogvideo_dist.data.index import REJECTED, Index, Record
from cogvideo_dist.data.loader import readers, tensor_of
from cogvideo_dist.data.pool import Task
from cogvideo_dist.data.reading import Cut, caption_member, media_extension, read_caption
from cogvideo_dist.data.shards import DataError, ShardReader, shown
from cogvideo_dist.data.sizes import assign_size
from cogvideo_dist.data.workshop import Outcome, build, recover, working_folder
from cogvideo_dist.engine.files import file_hash
from cogvideo_dist.models.text import TextEncoder
from cogvideo_dist.models.vae import VAE
from cogvideo_dist.tasks.pixels import encode_pixels, tiling_of
from launch.compose import cut_captions, load_text, load_vae, shown_tiling, weights_digest
from launch.environment import Worker, config_parser, device_of, read_place, read_worker, run_command, split_config

FORMAT = 1
"""Part of every address; another number when what is stored changes for the same inputs."""

ROLES = (
    Role("text", ("text.safetensors", "txt"), ("caption_tokens",)),
    Role("latent", ("latent.safetensors",)),
)

PASSING = ("damaged bytes", "missing member")
"""Defects that another copy of the shard need not have."""

CLIPS_PER_SHARD = 80
"""About 1 GB for 49 x 480 x 720: 9 MB of latents and 3.7 MB of text features each."""


def main() -> None:
    options = arguments()
    begun = time.monotonic()
    config = load_config(DiTRun, **split_config(options.config))
    if config.data.source != "pixels":
        raise ConfigError("data.source must be pixels, which are what this command encodes")
    worker, device = read_worker(options.task, options.tasks), device_of(read_place())
    encoders = Encoders.load(config, device)
    out, reader = Path(options.out).resolve(), ShardReader(one_set(config), config.data.remote)
    recover(out)
    old = read_set(out)
    plan = SetPlan(planned(config, encoders, reader=reader, old=old), ROLES, options.clips_per_shard)
    if worker.number == 0 and old is not None and (news := changes(plan, old)):
        print(f"{options.out} is brought up to date; {news}", flush=True)
    clips = Clips(reader, config, plan=plan, stride=worker.workers)
    outcome = build(
        out,
        plan,
        make=lambda number, role: encoders.make(reader, number, role=role, clips=clips),
        say=lambda text: tqdm.write(f"encode: {shown(text)}", file=sys.stderr),
        track=lambda steps, total: tqdm(steps, total=total, unit="clip", desc=f"worker {worker.number}"),
        worker=worker,
    )
    clips.reads.close()
    tell(options.out, outcome, worker=worker, seconds=time.monotonic() - begun)


def arguments() -> Any:
    parser = config_parser(
        "Encode a shard set of videos and images to latents (posterior mean and log-variance) and text features, so that "
        "training needs neither VAE nor T5 (for image-to-video models, whose first frames are kept, the VAE for one frame a "
        "clip). Clips are taken from their beginning and cropped at the centre. Any number of "
        "workers may share the work: ranks of torchrun or deepspeed, tasks of a Slurm array, or processes started by hand with "
        "--task and --tasks; they need a common file system and nothing else. Killed, and started again in any number, they go "
        "on where they were (in SHARDS.partial); the last one puts the set in place. Of a finished set, the command encodes "
        "again only what changed.",
        "python launch/encode.py --config configs/demo/dit.yaml --out runs/demo/latents\n"
        "  sbatch --array=0-7 --gpus=1 --wrap 'python launch/encode.py --config my.yaml --out my-latents'",
    )
    parser.add_argument("--out", required=True, metavar="SHARDS", help="the set, new or one that this command made")
    parser.add_argument(
        "--task", type=int, help="number of this process among --tasks, from 0; a Slurm array says it itself"
    )
    parser.add_argument("--tasks", type=int, help="how many processes share the work")
    parser.add_argument(
        "--clips-per-shard", type=int, default=CLIPS_PER_SHARD, metavar="N",
        help="samples of the input per shard of the output (%(default)s, about 1 GB for clips of 49 x 480 x 720)",
    )  # fmt: skip
    return parser.parse_args()


@dataclass(frozen=True)
class Encoders:
    """The frozen models, how they are used, and what of that decides the bytes they make (``vae_facts``, ``text_facts``)."""

    vae: VAE
    text: TextEncoder
    config: DiTRun
    origin: Mapping[str, Any]
    vae_facts: Mapping[str, Any]
    text_facts: Mapping[str, Any]

    @classmethod
    def load(cls, config: DiTRun, device: torch.device) -> Encoders:
        folder, frozen = Path(config.frozen.text or ""), config.frozen
        vae = load_vae(frozen.vae or "", device)
        text = load_text(str(folder), config.model.transformer(), device=device)
        tiling = tiling_of(vae, frozen.vae_tiling)
        digests = {"vae": weights_digest(vae), "text": text_digest(text, folder)}
        use: dict[str, Any] = {"semantics": frozen.vae_semantics, "tiling": shown_tiling(tiling)}
        if config.model.transformer().image_channels:
            use["image"] = True
        shape = {"text_length": text.length, "text_dim": text.dim}
        elsewhere = ("scaling_factor", "sample_height", "sample_width")  # in the origin and in the tiling
        vae_config = {name: value for name, value in asdict(vae.config).items() if name not in elsewhere}
        return cls(
            vae, text, config,
            origin={**digests, **use, "scaling_factor": vae.config.scaling_factor, "fps": config.data.fps, **shape},
            vae_facts={
                "format": FORMAT, "vae": digests["vae"], "vae_config": vae_config, **use, "crop": "center",
                "dtype": str(next(vae.parameters()).dtype),
            },
            text_facts={"format": FORMAT, "text": digests["text"], **shape, "dtype": str(text.t5.dtype)},
        )  # fmt: skip

    def addresses(self, record: Record, size: Sequence[int]) -> dict[str, str]:
        """The text's and the latent's, in the order of ``ROLES``."""
        still = record.kind == "image"
        clip = {
            "media": record.members[media_extension(record)].checksum, "kind": record.kind, "size": size,
            "fps": None if still else self.config.data.fps, "rotation": record.rotation,
        }  # fmt: skip
        caption = {"caption": record.members[caption_member(record)].checksum, "place": record.caption}
        return {"text": address_of({**self.text_facts, **caption}), "latent": address_of({**self.vae_facts, **clip})}

    def make(self, reader: ShardReader, number: int, *, role: str, clips: Clips) -> Item:
        """The item, or why there is none: for good if the bytes are at fault, for now if they are not those of the index."""
        try:
            if role == "latent":
                return self._latent(clips.pixels(number))
            allow = self.config.data.empty_captions
            return self._text(read_caption(reader.store, reader.records[number], allow_empty=allow))
        except DecodeError as error:
            return Item(reason=str(error))
        except DataError as error:
            return Item(reason=error.reason, lasting=error.code not in PASSING)

    def _text(self, caption: str) -> Item:
        features = self.text.encode([caption])[0].cpu().contiguous()
        members = {"text.safetensors": save({"text": features}), "txt": caption.encode()}
        return Item(members, {"caption_tokens": self.text.token_count(caption)})

    def _latent(self, pixels: torch.Tensor) -> Item:
        frozen = self.config.frozen
        posterior = encode_pixels(self.vae, pixels[None], semantics=frozen.vae_semantics, tiling=frozen.vae_tiling)
        moments = {"mean": posterior.mean[0].cpu().contiguous(), "logvar": posterior.logvar[0].cpu().contiguous()}
        if self.config.model.transformer().image_channels:
            moments["image"] = pixels[0].contiguous()
        return Item({"latent.safetensors": save(moments)})


class Clips:
    """Pixels of the clips to encode; the next one of this worker's share is read while one is encoded."""

    def __init__(self, reader: ShardReader, config: DiTRun, *, plan: SetPlan, stride: int) -> None:
        self.reads, self.records, self.fps = readers([reader.store], config.data), reader.records, config.data.fps
        self.plan, self.stride = plan, stride
        self.asked: dict[int, int] = {}

    def pixels(self, number: int) -> torch.Tensor:
        """uint8 [T, H, W, 3]; raises ``DataError``."""
        if number not in self.asked:
            self.reads.discard(self.asked.values())  # of clips that others made meanwhile
            self.asked.clear()
            self._ask(number)
        ticket = self.asked.pop(number)
        following = number + self.stride
        if following < len(self.plan.clips) and self.plan.clips[following].refusal is None:
            self._ask(following)
        loaded = self.reads.result(ticket)
        return tensor_of(loaded.content.arrays["pixels"], loaded.memory)

    def _ask(self, number: int) -> None:
        cut = Cut(self.plan.clips[number].facts["size"], self.fps, captioned=False)
        self.asked[number] = self.reads.submit(Task(0, self.records[number], cut))


def one_set(config: DiTRun) -> str:
    """The set to encode."""
    if config.data.shards is None:
        raise ConfigError("data.shards must name the set to encode; encode the sets of data.sources one by one")
    return config.data.shards


def text_digest(text: TextEncoder, folder: Path) -> str:
    """SHA-256 of the encoder's weights and configuration and of the tokenizer's files."""
    files = [folder / "text_encoder" / "config.json", *sorted((folder / "tokenizer").iterdir())]
    facts = {f"{path.parent.name}/{path.name}": file_hash(path) for path in files if path.is_file()}
    return address_of({"weights": weights_digest(text), "files": facts})


def planned(config: DiTRun, encoders: Encoders, *, reader: ShardReader, old: EncodedSet | None) -> list[Clip]:
    """Every clip as it is to be in the set, in the order of the shards."""
    suspects = {line["source"] for line in old.rejected if ADDRESSES not in line} if old is not None else set()
    clips = []
    for record in reader.records:
        size = assign_size(record, config.data)
        refusal = size if isinstance(size, str) else unreadable(reader, record, look=record.source in suspects)
        if isinstance(size, str) or refusal is not None:
            clips.append(Clip(record.key, record.source, refusal=refusal))
            continue
        facts = {
            "source": record.source, "kind": "latent", "frames": size[0], "fps": config.data.fps, "height": size[1],
            "width": size[2], "caption_length": record.caption_length, "size": size, "origin": encoders.origin,
            "scores": dict(record.scores),
        }  # fmt: skip
        clips.append(Clip(record.key, record.source, facts, encoders.addresses(record, size)))
    return clips


def unreadable(reader: ShardReader, record: Record, *, look: bool) -> str | None:
    """Why what is to be encoded cannot be read: it is missing, or damaged, which only a ``look`` can tell."""
    needed = (caption_member(record), media_extension(record))
    try:
        for extension in needed:
            if look or extension not in record.members:
                reader.read(record, extension)
    except DataError as error:
        return error.reason
    return None


def changes(plan: SetPlan, old: EncodedSet) -> str:
    """What has to be encoded again or for the first time, and why; nothing if nothing has to be."""
    before = {record.source: record for record in old.records}
    known = {address for record in old.records for address in record.origin[ADDRESSES].values()}
    refused = [line.get(ADDRESSES) for line in old.rejected]
    parts = []
    for role, what in (("latent", "clips"), ("text", "captions")):
        why = Counter(
            cause(clip, before.get(clip.source), role=role)
            for clip in plan.clips
            if clip.addresses and clip.addresses[role] not in known and clip.addresses not in refused
        )
        if why:
            parts.append(f"{what}: " + ", ".join(f"{count} ({reason})" for reason, count in why.most_common()))
    return "; ".join(parts)


def cause(clip: Clip, before: Record | None, *, role: str) -> str:
    """Why what was made of a clip does not serve any more."""
    if before is None:
        return "new"
    for name in ("vae", "semantics", "tiling", "fps") if role == "latent" else ("text", "text_length", "text_dim"):
        found, wanted = before.origin[name], clip.facts["origin"][name]
        if found != wanted:
            short = 12 if name in ("vae", "text") else None  # of a digest
            return f"{name} was {str(found)[:short]}, now {str(wanted)[:short]}"
    if role == "latent" and before.size != clip.facts["size"]:
        return f"size was {list(before.size or ())}, now {list(clip.facts['size'])}"
    return "changed"


def tell(out: str, outcome: Outcome, *, worker: Worker, seconds: float) -> None:
    """How it ended, and what this worker did."""
    if outcome.missing:
        print(
            f"{out} is not complete: {outcome.missing}; the last worker completes it, and the same command goes on where a "
            "stopped one ended"
        )
    elif outcome.unchanged:
        print(f"{out} was completed by another worker" if outcome.made else f"{out} is up to date, nothing to encode")
        if working_folder(Path(out)).exists():
            print(
                f"{working_folder(Path(out))} holds an unfinished set of another configuration; delete it if unwanted"
            )
    else:
        records, rejected = Index.read(out), (Path(out) / REJECTED).read_bytes().count(b"\n")
        print(f"{len(records)} samples encoded into {out}, {rejected} could not be used")
        cut = cut_captions(records)
        if cut:
            first = f"{cut[0].source}: {cut[0].reason}"
            print(f"{len(cut)} captions were cut; runs list them in data_report.jsonl; first: {first}")
    print(
        f"worker {worker.number} of {worker.workers}: encoded {outcome.made['latent']} clips and "
        f"{outcome.made['text']} captions, reused {outcome.reused}, unusable {outcome.unusable}, {seconds:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    run_command("encode", main)
