"""From a prompt's features to a video: the one path that validation, launch/sample.py and tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cogvideo_dist.config.schema import SPATIAL, TEMPORAL, ImageCondition, Sampling, Size
from cogvideo_dist.diffusion.guidance import guidance_scale, guide
from cogvideo_dist.diffusion.samplers import SAMPLERS, Denoise, Draw, first_step, folded_noise, sample
from cogvideo_dist.diffusion.schedule import Schedule
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.models.vae import VAE, Semantics
from cogvideo_dist.parallel.mesh import Axis, ParallelMesh
from cogvideo_dist.parallel.ops import gather
from cogvideo_dist.rng import fold
from cogvideo_dist.tasks.condition import Conditioner, padded_front
from cogvideo_dist.tasks.decoding import decoded
from cogvideo_dist.tasks.pixels import encode_pixels

Preview = Callable[[int, Tensor], None]
"""(index of a step in the grid, the clean latents [T, C, H, W] predicted at it)."""


def latent_frames(size: Size) -> int:
    """Latent frames of a video of ``size``."""
    return (size[0] - 1) // TEMPORAL + 1


def latent_shape(size: Size, *, channels: int, patch_t: int) -> tuple[int, int, int, int]:
    """[T, C, H, W] of the latent that becomes a video of ``size``, with the frames in front that whole patches need."""
    frames = latent_frames(size)
    return frames + (-frames) % patch_t, channels, size[1] // SPATIAL, size[2] // SPATIAL


@dataclass(frozen=True)
class Ranks:
    """Who samples a video together: its tokens are divided over ``mesh`` (left out: over the model's tensor-parallel ranks),
    guidance's branches over ``branches``, of one or two ranks, and what is decoded over ``cp``."""

    mesh: ParallelMesh | None = None
    branches: Axis = field(default_factory=lambda: Axis("branches"))
    cp: Axis = field(default_factory=lambda: Axis("cp"))


def check_image(config: DiTConfig, shape: tuple[int, ...] | None, *, settings: Sampling) -> None:
    """Refuse an image that the model does not take, none where it needs one, and one of another size than the video's."""
    if shape is None and config.image_channels:
        raise ValueError("this model continues an image; give the first frame (--image, or image in a prompts file)")
    if shape is not None and not config.image_channels:
        raise ValueError("this model makes videos of text alone and takes no image; leave the image out")
    if shape is not None and shape != (3, *settings.size[1:]):
        raise ValueError(
            f"an image for videos of {list(settings.size)} must be {[3, *settings.size[1:]]}, found {list(shape)}"
        )


class Edit(NamedTuple):
    """A video to start from, uint8 [T, H, W, 3], and the share of the steps, in (0, 1], that are done on it."""

    pixels: Tensor
    strength: float


class Start(NamedTuple):
    """Clean latents [T, C, H, W] to start from, and the index in the grid of the first step that is done."""

    latents: Tensor
    step: int


@dataclass(frozen=True)
class Sampler:
    """A transformer with all that turns its velocities into pixels. ``image``: how an image becomes its condition."""

    model: DiT
    vae: VAE
    schedule: Schedule
    latent_scale: float
    vae_semantics: Semantics
    vae_tiling: bool = False
    image: ImageCondition = field(default_factory=ImageCondition)
    ranks: Ranks = field(default_factory=Ranks)

    def initial_noise(self, settings: Sampling, seed: int) -> Tensor:
        """[T, C, H, W] float32 on the CPU."""
        config = self.model.config
        shape = latent_shape(settings.size, channels=config.out_channels, patch_t=config.patch[0])
        return torch.randn(shape, generator=fold(seed, "initial noise"))

    def condition(self, image: Tensor | None, settings: Sampling, *, seed: int) -> Tensor | None:
        """An image [3, H, W] in [-1, 1] as the model takes it, [T, C, h, w]; nothing for a model that takes none.

        Raises ValueError where the model and what is given do not go together.
        """
        check_image(self.model.config, None if image is None else tuple(image.shape), settings=settings)
        if image is None:
            return None
        conditioner = Conditioner(
            self.vae, self.image, self.latent_scale, self.model.config.patch[0], tiling=self.vae_tiling
        )
        return conditioner(image, latent_frames(settings.size), generator=fold(seed, "image posterior"))

    @torch.no_grad()
    def start(self, edit: Edit | None, settings: Sampling, *, seed: int) -> Start | None:
        """A video's latents as sampling takes them up, with the front padding of 1.5."""
        if edit is None:
            return None
        if tuple(edit.pixels.shape[:3]) != tuple(settings.size):
            raise ValueError(
                f"a video to start from must be {list(settings.size)}, found {list(edit.pixels.shape[:3])}"
            )
        step = first_step(settings.steps, strength=edit.strength)
        posterior = encode_pixels(self.vae, edit.pixels[None], semantics=self.vae_semantics, tiling=self.vae_tiling)
        latents = posterior.sample(fold(seed, "video posterior"))[0].float().cpu().transpose(0, 1)
        return Start(padded_front(latents * self.latent_scale, self.model.config.patch[0]), step)

    @torch.no_grad()
    def latents(
        self, text: Tensor, settings: Sampling, *, noise: Tensor, draw: Draw, condition: Tensor | None = None,
        start: Start | None = None, preview: Preview | None = None,
    ) -> Tensor:  # fmt: skip
        """Text features [L, dim] and initial noise -> latents [T, C, H, W] (scaled, padding removed), alike on all ranks.

        ``condition`` and ``start`` are those that the methods of these names make.
        """
        padding = (-latent_frames(settings.size)) % self.model.config.patch[0]
        first = 0 if start is None else start.step
        sampler = SAMPLERS[settings.sampler](self.schedule, settings.steps)
        if start is not None:
            noise = self.schedule.add_noise(start.latents, noise, timestep=torch.tensor(sampler.grid.timesteps[first]))
        guided = self._guided(text, settings, condition=condition, first=first)
        noise = noise.to(self.model.embed.patch.weight.device)

        def seen(index: int, x0: Tensor) -> None:
            if preview is not None:
                preview(index, x0[padding:])

        latents = sample(guided, noise, sampler=sampler, draw=draw, first=first, preview=seen)
        return latents[padding:]

    def _guided(self, text: Tensor, settings: Sampling, *, condition: Tensor | None, first: int) -> Denoise:
        """The guided velocity. Its two branches, zero features and the prompt's, are a batch of two clips, or one clip on each
        of two ranks; both have the image."""
        branches, weight = self.ranks.branches, self.model.embed.patch.weight
        device, dtype = weight.device, weight.dtype
        features = torch.stack([torch.zeros_like(text), text]).to(device, dtype)
        if branches.size > 1:
            features = features[branches.rank : branches.rank + 1]
        count, steps = len(features), settings.steps - first
        image = None if condition is None else condition.to(device, dtype).expand(count, *condition.shape)
        ofs = torch.full((count,), self.image.ofs, device=device) if self.model.config.ofs else None

        def denoise(x: Tensor, timestep: int, *, index: int) -> Tensor:
            times = torch.full((count,), timestep, device=device)
            x = x.to(dtype).expand(count, *x.shape)
            velocity = self.model.denoise(x, features, times, image, ofs, mesh=self.ranks.mesh).float()
            without, with_text = gather(velocity, branches, counts=(1,) * branches.size).wait()
            # Counted over the steps that are done, as the public pipelines count.
            scale = guidance_scale(
                settings.guidance_kind, settings.guidance, step_index=index - first, timestep=timestep, steps=steps
            )
            return guide(without, with_text, scale=scale)

        return denoise

    def latents_of(
        self, text: Tensor, settings: Sampling, *, seed: int, image: Tensor | None = None, edit: Edit | None = None,
        preview: Preview | None = None,
    ) -> Tensor:  # fmt: skip
        """``latents``, a function of the seed and of what is given alone: image [3, H, W] in [-1, 1]."""
        return self.latents(
            text, settings, noise=self.initial_noise(settings, seed), draw=folded_noise(seed),
            condition=self.condition(image, settings, seed=seed), start=self.start(edit, settings, seed=seed),
            preview=preview,
        )  # fmt: skip

    def pieces(self, latents: Tensor) -> Iterator[Tensor]:
        """Latents [T, C, H, W] -> video in about [-1, 1], in pieces [3, any t, H, W], on every rank of ``cp``."""
        return decoded(
            self.vae, latents / self.latent_scale, semantics=self.vae_semantics, tiling=self.vae_tiling,
            cp=self.ranks.cp,
        )  # fmt: skip

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [T, C, H, W] -> video [3, T, H, W] in about [-1, 1]."""
        return torch.cat(list(self.pieces(latents)), dim=1)

    def still(self, latents: Tensor) -> Tensor:
        """The middle latent frame decoded by itself, as if the video began there, [3, 1, H, W]: a look at a running sample
        for the cost of one frame. Without other ranks."""
        middle = latents[len(latents) // 2 :][:1] / self.latent_scale
        pieces = decoded(self.vae, middle, semantics=self.vae_semantics, tiling=self.vae_tiling, cp=Axis("cp"))
        return next(pieces)

    def video(
        self, text: Tensor, settings: Sampling, *, seed: int, image: Tensor | None = None, edit: Edit | None = None,
        preview: Preview | None = None,
    ) -> Tensor:  # fmt: skip
        """Text features [L, dim] and, where the model takes one, an image [3, H, W] in [-1, 1] -> video [3, T, H, W], a
        function of these and the seed alone."""
        return self.decode(self.latents_of(text, settings, seed=seed, image=image, edit=edit, preview=preview))
