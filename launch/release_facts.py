"""What a release's card tells of the run that it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cogvideo_dist import __version__
from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import digest
from cogvideo_dist.config.schema import DiTRun, Sampling, Size
from cogvideo_dist.engine.checkpoint import checkpoints, read_manifest
from cogvideo_dist.engine.lineage import Lineage

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """A run, of whose step ``step`` the ``weights`` ("ema" or "raw") are released."""

    run: Path
    config: DiTRun | VAERun
    step: int
    weights: str

    def facts(self) -> Facts:
        """Rows of the card's table."""
        manifest = self._manifest()
        lineage = Lineage.of(manifest.get("lineage", ()), source=str(self.run))
        samples = manifest.get("samples", 0)
        train, data = self.config.train, self.config.data
        return [
            ("Began from", self._beginning(lineage)),
            *(
                (f"Stage {number}", f"{short(each.run)}: {each.step:,} steps, {each.samples:,} clips; its {each.weights} "
                 f"weights went on (SHA-256 {each.sha256[:16]})")
                for number, each in enumerate(lineage.ancestors, 1)
            ),
            ("Steps", _total(self.step, lineage.steps)),
            ("Clips seen", _total(samples, lineage.samples)),
            ("Weights", _weights(self.weights, train.ema_decay)),
            *self._adapters(),
            ("Optimizer", f"{train.optimizer}, learning rate {train.learning_rate:g} ({train.schedule}, {train.warmup_steps} "
             f"steps of warm-up), weight decay {train.weight_decay:g}, clipped at {train.clip_norm}"),
            ("Precision of training", train.precision),
            ("Layout of ranks", self._layout(manifest)),
            ("Clips", f"{', '.join(_size(size) for size in data.sizes)} (frames x height x width) at {data.fps:g} fps"),
            *self._data(),
            ("Seed", str(self.config.run.seed)),
            ("Configuration", f"SHA-256 {digest(self.config)}"),
            ("Versions", f"cogvideo_dist {__version__}, torch {_torch(manifest)}"),
        ]  # fmt: skip

    def _manifest(self) -> Mapping[str, Any]:
        found = (read_manifest(path) for path in reversed(checkpoints(self.run / "ckpt")))
        return next(manifest for manifest in found if manifest["step"] == self.step)

    def _beginning(self, lineage: Lineage) -> str:
        if lineage.ancestors:
            return f"the run {short(lineage.ancestors[0].run)}"
        given = self.config.model.weights
        return f"the weights of {short(given)}" if given else f"weights drawn from seed {self.config.run.seed}"

    def _adapters(self) -> Facts:
        if not isinstance(self.config, DiTRun) or self.config.lora is None:
            return []
        each = ", ".join(f"{name} {a.rank}/{a.alpha:g}" for name, a in self.config.lora.adapters().items())
        return [("Adapters (rank/alpha)", each)]

    def _layout(self, manifest: Mapping[str, Any]) -> str:
        """As the checkpoint was written; of one that does not say it, as the configuration asks for."""
        layout = manifest.get("facts", {}).get("layout")
        if layout is None:
            layout = vars(self.config.parallel) | {"zero_stage": self.config.train.zero_stage}
        return ", ".join(f"{name} {value}" for name, value in layout.items() if value is not None)

    def _data(self) -> Facts:
        """What the run noted of its sources, under their folders' names; a path is nobody else's business."""
        path = self.run / "data.json"
        if not path.exists():
            return []
        sources = json.loads(path.read_text(encoding="utf-8"))
        return [
            (f"Data {number}", f"{short(each['shards'])}: {each['samples']:,} samples, index {each['digest']}")
            for number, each in enumerate(sources, 1)
        ]


def sampler_fact(sampling: Sampling) -> tuple[str, str]:
    return (
        "Recommended sampling",
        f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance:g} ({sampling.guidance_kind}), "
        f"{_size(sampling.size)} at {sampling.fps:g} fps",
    )


def _size(size: Size) -> str:
    return "x".join(map(str, size))


def size_fact(model: nn.Module) -> tuple[str, str]:
    return "Parameters", f"{sum(p.numel() for p in model.parameters()):,}"


def short(path: str) -> str:
    """The last two names of a path, which are what a folder is known by: CogVideoX-5b/transformer."""
    return "/".join([part for part in Path(path).parts if part != "/"][-2:])


def _total(own: int, before: int) -> str:
    return f"{own + before:,}, of them {own:,} in the last stage" if before else f"{own:,}"


def _weights(weights: str, decay: float | None) -> str:
    return f"averaged (EMA, decay {decay:g})" if weights == "ema" and decay is not None else "as of the last step"


def _torch(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("torch") or manifest.get("facts", {}).get("versions", {}).get("torch", "unknown"))
