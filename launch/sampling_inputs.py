"""What is to be sampled: prompts with their seeds, images and videos, from the command line and from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.config.schema import Sampling
from cogvideo_dist.data.decode import DecodeError, decode_video
from cogvideo_dist.models.presets import DiTConfig
from cogvideo_dist.tasks.condition import read_image
from cogvideo_dist.tasks.sampling import check_image

SEEDS = range(2**63)
KEYS = ("prompt", "seed", "image", "video")
"""Of a line of a .jsonl file; all but the prompt may be left out."""


@dataclass(frozen=True)
class Request:
    """A video to sample. ``image`` and ``video`` are files; ``origin`` says where the request stands."""

    prompt: str
    seed: int | None = None
    image: Path | None = None
    video: Path | None = None
    origin: str = "--prompt"


def read_requests(
    prompts: Sequence[str], file: str | None, *, image: str | None = None, video: str | None = None
) -> list[Request]:
    """Those of the command line, then those of ``file``; ``image`` and ``video`` are for all that name none of their own.

    Raises ``ConfigError`` naming the file and the line.
    """
    found = [Request(prompt) for prompt in prompts] + ([] if file is None else _of_file(Path(file)))
    if not found:
        raise ConfigError("give a prompt with --prompt or --prompts-file")
    first, start = (None if path is None else Path(path) for path in (image, video))
    return [replace(each, image=each.image or first, video=each.video or start) for each in found]


def seeds_of(requests: Sequence[Request], *, first: int) -> list[int]:
    """Of every request; they count up from ``first``, one for each request, wherever it has none of its own."""
    return [first + number if each.seed is None else each.seed for number, each in enumerate(requests)]


def _of_file(path: Path) -> list[Request]:
    """Of plain text, a prompt a line; of .jsonl, an object a line, whose paths are relative to the file's folder."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts-file {path}: cannot be read as UTF-8 text: {error}") from None
    full = [(f"{path}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [Request(line, origin=origin) for origin, line in full]
    return [_of_line(line, origin=origin, folder=path.parent) for origin, line in full]


def _of_line(line: str, *, origin: str, folder: Path) -> Request:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{origin}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f'{origin}: expected an object such as {{"prompt": "A cat.", "seed": 1}}, found {line[:40]}')
    if unknown := [key for key in value if key not in KEYS]:
        raise ConfigError(f"{origin}: unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    prompt, seed = value.get("prompt"), value.get("seed")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f"{origin}: prompt must be text, found {prompt!r}")
    if "seed" in value and (type(seed) is not int or seed not in SEEDS):  # a bool is an int as well
        raise ConfigError(f"{origin}: seed must be an integer in [0, 2^63), found {seed!r}")
    files = {key: _file(value[key], key, origin, folder) for key in ("image", "video") if key in value}
    return Request(prompt.strip(), seed, files.get("image"), files.get("video"), origin)


def _file(value: Any, key: str, origin: str, folder: Path) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{origin}: {key} must be the path of a file, found {value!r}")
    return folder / value


def check_requests(requests: Sequence[Request], config: DiTConfig, *, settings: Sampling) -> None:
    """Refuse what the model does not take and files that cannot be read, before anything is sampled."""
    for request in requests:
        try:
            check_image(config, None if request.image is None else (3, *settings.size[1:]), settings=settings)
        except ValueError as error:
            raise ConfigError(f"{request.origin}: {error}") from None
        image_of(request, settings)
        video_of(request, settings)


def image_of(request: Request, settings: Sampling) -> Tensor | None:
    """The request's image [3, H, W] in [-1, 1], scaled down to cover the video's size and cut around its middle."""
    if request.image is None:
        return None
    try:
        return read_image(request.image, settings.size)
    except ValueError as error:
        raise ConfigError(f"{request.origin}: {error}") from None


def video_of(request: Request, settings: Sampling) -> Tensor | None:
    """The request's video, uint8 [T, H, W, 3], from its beginning, at the video's rate and size."""
    if request.video is None:
        return None
    pixels = np.empty((*settings.size, 3), np.uint8)
    try:
        decode_video(request.video.read_bytes(), pixels, fps=settings.fps)
    except (OSError, DecodeError) as error:
        raise ConfigError(f"{request.origin}: {request.video}: {error}") from None
    return torch.from_numpy(pixels)
