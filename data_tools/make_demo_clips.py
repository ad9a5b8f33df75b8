"""Make a small captioned data set of real photographs seen through a moving camera, without a download.

    pip install scikit-image
    python data_tools/make_demo_clips.py DST --clips 32 --seed 0

Writes ``DST/videos/*.mp4`` (H.264, several sizes, durations and frame rates), ``DST/images/*.png`` and a caption for
each in ``DST/labels/*.txt``. The photographs come with the scikit-image package. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from cogvideo_dist.evaluation.media import replacing, write_mp4, write_png
from cogvideo_dist.rng import fold

VIDEO_SIZES = ((96, 128), (128, 96), (112, 112), (96, 160), (120, 160))
IMAGE_SIZES = ((192, 256), (256, 192), (192, 192))
RATES = (8, 12, 24, 30)
SECONDS = (0.8, 4.0)
IMAGE_SHARE = 3 / 16
SUPERSAMPLE = 2


@dataclass(frozen=True)
class Scene:
    """A part of a photograph: its file, what it shows, and its box (left, top, right, bottom) in shares of it."""

    photo: str
    words: str
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """What the camera sees of a box.

    ``x``, ``y`` in [-1, 1] from border to border, ``zoom`` a share of the largest view that fits, ``angle`` in degrees,
    clockwise.
    """

    x: float = 0.0
    y: float = 0.0
    zoom: float = 0.7
    angle: float = 0.0


@dataclass(frozen=True)
class Motion:
    """A camera path from ``start`` to ``stop``: its ``verb``, and the ``link`` between it and what is seen."""

    verb: str
    link: str
    start: View
    stop: View


SCENES = (
    Scene("astronaut.png", "a smiling astronaut in an orange space suit", (0.0, 0.0, 1.0, 0.8)),
    Scene("chelsea.png", "a tabby cat with green eyes"),
    Scene("coffee.png", "a red coffee cup on a wooden table"),
    Scene("rocket.jpg", "a white rocket on its launch pad at dusk"),
    Scene("motorcycle_left.png", "a red motorcycle in a garage"),
    Scene("hubble_deep_field.jpg", "distant galaxies in a black sky"),
    Scene("camera.png", "a man in a dark coat filming with a camera on a tripod, in black and white"),
    Scene("astronaut.png", "the face of a smiling woman with short blond hair", (0.2, 0.0, 0.72, 0.45)),
    Scene("chelsea.png", "the eyes, nose and whiskers of a brown cat", (0.18, 0.08, 0.85, 0.95)),
    Scene("coffee.png", "a small metal spoon on a red saucer", (0.3, 0.35, 0.9, 1.0)),
    Scene("rocket.jpg", "bright lights at the foot of a rocket", (0.1, 0.5, 0.9, 1.0)),
    Scene("motorcycle_left.png", "the engine and front wheel of a red motorcycle", (0.4, 0.25, 0.97, 0.95)),
    Scene("astronaut.png", "a model of a space shuttle behind an astronaut", (0.45, 0.0, 1.0, 0.6)),
    Scene("camera.png", "the head and hands of a man at a camera, in black and white", (0.15, 0.08, 0.75, 0.6)),
    Scene("coins.png", "rows of old silver coins on a dark cloth"),
    Scene("motorcycle_left.png", "garage shelves full of boxes above a motorcycle", (0.4, 0.0, 1.0, 0.6)),
    Scene("astronaut.png", "a white space helmet with a dark visor", (0.3, 0.5, 1.0, 1.0)),
)

MOTIONS = (
    Motion("pans right", "over", View(x=-0.9), View(x=0.9)),
    Motion("zooms in", "on", View(zoom=1.0), View(zoom=0.6)),
    Motion("tilts up", "along", View(y=0.9), View(y=-0.9)),
    Motion("pans left", "over", View(x=0.9), View(x=-0.9)),
    Motion("turns clockwise", "in front of", View(zoom=0.9, angle=-12.0), View(zoom=0.9, angle=12.0)),
    Motion("zooms out", "from", View(zoom=0.6), View(zoom=1.0)),
    Motion("tilts down", "along", View(y=-0.9), View(y=0.9)),
    Motion("drifts down and to the right", "across", View(x=-0.6, y=-0.6), View(x=0.6, y=0.6)),
    Motion("pans right and zooms in", "on", View(x=-0.7, zoom=0.9), View(x=0.5, zoom=0.6)),
    Motion("turns counterclockwise", "in front of", View(zoom=0.9, angle=12.0), View(zoom=0.9, angle=-12.0)),
    Motion("drifts up and to the left", "across", View(x=0.6, y=0.6), View(x=-0.6, y=-0.6)),
    Motion("pans left and zooms out", "from", View(x=0.5, zoom=0.6), View(x=-0.7, zoom=0.9)),
    Motion("zooms in and turns clockwise", "on", View(zoom=1.0, angle=-8.0), View(zoom=0.65, angle=8.0)),
)


@dataclass(frozen=True)
class Shot:
    """One file to be made: a scene, a motion (of which an ``amount`` is done), and its size [H, W], frames and rate."""

    name: str
    caption: str
    scene: Scene
    motion: Motion
    amount: float
    size: tuple[int, int]
    frames: int
    fps: int


def plan_shots(clips: int, seed: int) -> Iterator[Shot]:
    """The files of a data set; scenes, motions, sizes and rates take turns, so that few clips already differ in all."""
    scenes = [SCENES[i] for i in torch.randperm(len(SCENES), generator=fold(seed, "scenes")).tolist()]
    images = round(clips * IMAGE_SHARE)
    for index in range(clips):
        scene, motion = scenes[index % len(scenes)], MOTIONS[index % len(MOTIONS)]
        draws = torch.rand(3, generator=fold(seed, "shot", index)).tolist()
        if index >= clips - images:
            size = IMAGE_SIZES[index % len(IMAGE_SIZES)]
            caption = f"A photograph of {scene.words}."
            yield Shot(f"image_{index:03d}", caption, scene, motion, amount=draws[1], size=size, frames=1, fps=1)
            continue
        seconds = SECONDS[0] + draws[0] * (SECONDS[1] - SECONDS[0])
        amount = 0.5 + 0.5 * draws[1]
        fps = RATES[index % len(RATES)]
        caption = describe(scene, motion, speed=amount / seconds, scene_first=draws[2] < 0.4)
        size = VIDEO_SIZES[index % len(VIDEO_SIZES)]
        frames = round(seconds * fps)
        yield Shot(f"clip_{index:03d}", caption, scene, motion, amount=amount, size=size, frames=frames, fps=fps)


def describe(scene: Scene, motion: Motion, *, speed: float, scene_first: bool) -> str:
    """A caption in plain words; ``speed`` is the share of the motion's full path that is covered per second."""
    adverb = "slowly " if speed < 0.35 else "quickly " if speed > 0.7 else ""
    if scene_first:
        return f"{scene.words[0].upper()}{scene.words[1:]}, while the camera {adverb}{motion.verb}."
    return f"The camera {adverb}{motion.verb} {motion.link} {scene.words}."


def render(shot: Shot) -> Tensor:
    """The shot's frames, uint8 [T, H, W, 3], sampled at sub-pixel positions from ``SUPERSAMPLE`` times finer pixels."""
    photo = load_photo(shot.scene.photo)
    theta, tallest = camera_path(shot, photo.size)
    fine = (SUPERSAMPLE * shot.size[0], SUPERSAMPLE * shot.size[1])
    scale = fine[0] / tallest
    # no photo pixel may fall between the fine ones, or edges would flicker as the camera moves
    photo.thumbnail((math.ceil(photo.width * scale), math.ceil(photo.height * scale)), Image.Resampling.LANCZOS)
    pixels = pil_to_tensor(photo).float().expand(shot.frames, -1, -1, -1)
    grid = F.affine_grid(theta, [shot.frames, 3, *fine], align_corners=False)
    seen = F.grid_sample(pixels, grid, align_corners=False, padding_mode="reflection")
    return F.avg_pool2d(seen, SUPERSAMPLE).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def camera_path(shot: Shot, photo: tuple[int, int]) -> tuple[Tensor, float]:
    """Affine maps [T, 2, 3] from frame to photo, both in [-1, 1], and the greatest height of the view in photo pixels.

    ``photo`` is its (width, height). A view of height h is aspect*h wide; turned, it covers
    (aspect*cos + sin) h x (aspect*sin + cos) h, which stays inside the scene's box all the way.
    """
    start, stop = vars(shot.motion.start), vars(shot.motion.stop)
    time = torch.linspace(0, 1, shot.frames) if shot.frames > 1 else torch.full((1,), 0.5)
    eased = 0.5 * time + 0.5 * time**2 * (3 - 2 * time)
    progress = 0.5 + shot.amount * (eased - 0.5)
    x, y, zoom, degrees = (start[key] + (stop[key] - start[key]) * progress for key in start)
    left, top, right, bottom = (share * photo[i % 2] for i, share in enumerate(shot.scene.box))
    aspect = shot.size[1] / shot.size[0]
    cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    cover_x, cover_y = aspect * cos + sin.abs(), aspect * sin.abs() + cos
    height = zoom * min((right - left) / cover_x.max(), (bottom - top) / cover_y.max())
    center_x = (left + right) / 2 + x * (right - left - cover_x * height) / 2
    center_y = (top + bottom) / 2 + y * (bottom - top - cover_y * height) / 2
    across = torch.stack([aspect * height * cos, -height * sin, 2 * center_x], dim=-1) / photo[0]
    down = torch.stack([aspect * height * sin, height * cos, 2 * center_y], dim=-1) / photo[1]
    return torch.stack([across, down], dim=1) - torch.tensor([0.0, 0.0, 1.0]), float(height.max())


def load_photo(name: str) -> Image.Image:
    """A photograph that is part of the scikit-image package, in colour."""
    with as_file(files("skimage") / "data" / name) as path, Image.open(path) as photo:
        return photo.convert("RGB")


def make_clips(folder: str | Path, *, clips: int = 32, seed: int = 0) -> list[Shot]:
    """Write the data set into ``folder``, which must not hold one yet; returns what was made."""
    root = Path(folder)
    if clips < 1:
        raise ValueError(f"--clips must be at least 1, found {clips}")
    for name in ("videos", "images", "labels"):
        if (root / name).exists():
            raise ValueError(f"{root / name} is already there; remove it or choose another folder")
    shots = list(plan_shots(clips, seed))
    for shot in shots:
        if shot.frames > 1:
            write_mp4(root / "videos" / f"{shot.name}.mp4", render(shot), shot.fps)
        else:
            write_png(root / "images" / f"{shot.name}.png", render(shot)[0])
        with replacing(root / "labels" / f"{shot.name}.txt") as temporary:
            temporary.write_text(shot.caption + "\n", encoding="utf-8")
    return shots


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DST", help="folder to make")
    parser.add_argument("--clips", type=int, default=32, help="videos and images together, about 4 to 1")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        shots = make_clips(arguments.folder, clips=arguments.clips, seed=arguments.seed)
    except ValueError as error:
        parser.error(str(error))
    videos = sum(shot.frames > 1 for shot in shots)
    print(f"{arguments.folder}: {videos} videos and {len(shots) - videos} images with captions")


if __name__ == "__main__":
    main()
