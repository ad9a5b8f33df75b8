from __future__ import annotations

from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_tools.make_demo_clips import (
    MOTIONS,
    SCENES,
    Scene,
    Shot,
    camera_path,
    load_photo,
    make_clips,
    plan_shots,
    render,
)

MOTION = {motion.verb: motion for motion in MOTIONS}


def shot(verb: str, scene: Scene = SCENES[2], *, amount: float = 1.0, frames: int = 9) -> Shot:
    return Shot("a", "A cup.", scene, MOTION[verb], amount=amount, size=(48, 64), frames=frames, fps=8)


def corners(theta: Tensor) -> Tensor:
    """Where the frame's corners lie in the photo, [T, 4, 2] in [0, 1]."""
    square = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [-1, 1, 1], [1, 1, 1]])
    return (square @ theta.transpose(1, 2) + 1) / 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Shot]]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, make_clips(folder, clips=6, seed=1)


def test_files_are_what_was_planned(made: tuple[Path, list[Shot]]) -> None:
    folder, shots = made
    assert len(list((folder / "labels").iterdir())) == len(shots) == 6
    for item in shots:
        assert (folder / "labels" / f"{item.name}.txt").read_text().strip() == item.caption
        if item.frames == 1:
            with Image.open(folder / "images" / f"{item.name}.png") as image:
                assert image.size == (item.size[1], item.size[0])
            continue
        with av.open(str(folder / "videos" / f"{item.name}.mp4")) as container:
            frames = list(container.decode(video=0))
            assert container.streams.video[0].average_rate == item.fps
        assert len(frames) == item.frames and (frames[0].height, frames[0].width) == item.size


def test_the_seed_alone_decides_the_files(made: tuple[Path, list[Shot]], tmp_path: Path) -> None:
    folder, _ = made
    make_clips(tmp_path, clips=6, seed=1)
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.*"))
    assert len(paths) == 12 and paths == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    for path in paths:
        assert (folder / path).read_bytes() == (tmp_path / path).read_bytes()
    assert [item.caption for item in plan_shots(6, 2)] != [item.caption for item in plan_shots(6, 1)]


def test_a_full_set_is_varied() -> None:
    shots = list(plan_shots(32, 0))
    videos = [item for item in shots if item.frames > 1]
    assert len(videos) == 26 and len({item.name for item in shots}) == 32
    assert len({item.caption for item in shots}) == 32
    assert {item.fps for item in videos} == {8, 12, 24, 30} and len({item.size for item in videos}) >= 4
    assert len({item.scene.photo for item in shots}) >= 5 and {item.motion.verb for item in videos} == set(MOTION)
    seconds = [item.frames / item.fps for item in videos]
    assert 0.7 < min(seconds) < 1.5 and 3 < max(seconds) <= 4.05


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.words)
def test_no_view_leaves_its_scene(scene: Scene) -> None:
    size = load_photo(scene.photo).size
    low, high = torch.tensor(scene.box[:2]), torch.tensor(scene.box[2:])
    for verb in MOTION:
        seen = corners(camera_path(shot(verb, scene), size)[0])
        assert (seen > low - 1e-5).all() and (seen < high + 1e-5).all(), verb


def test_the_camera_does_what_the_caption_says() -> None:
    size = load_photo(SCENES[2].photo).size
    paths = {verb: camera_path(shot(verb), size)[0] for verb in MOTION}
    for verb, path in paths.items():
        steps = path.diff(dim=0).mean(0)
        side = path[:, :, :2].norm(dim=(1, 2))
        assert (steps[0, 2] > 0.01) == ("right" in verb) and (steps[0, 2] < -0.01) == ("left" in verb), verb
        assert (steps[1, 2] > 0.01) == ("down" in verb) and (steps[1, 2] < -0.01) == ("up" in verb), verb
        assert (side[-1] < 0.9 * side[0]) == ("zooms in" in verb), verb
        assert (side[-1] > 1.1 * side[0]) == ("zooms out" in verb), verb
        # clockwise: the right end of the frame sinks in the photo
        assert (steps[1, 0] > 0.01) == ("turns clockwise" in verb), verb
        assert (steps[1, 0] < -0.01) == ("counterclockwise" in verb), verb


def test_motion_is_smooth_and_finer_than_a_pixel() -> None:
    clip = render(shot("pans right", amount=0.1, frames=24)).float()
    steps = (clip[1:] - clip[:-1]).abs().mean(dim=(1, 2, 3))
    assert steps.min() > 0.05 and steps.max() < 3 * steps.mean(), "every frame moves a little, none jumps"
    assert clip.std() > 30, "the picture has content"


def test_an_existing_set_is_not_overwritten(made: tuple[Path, list[Shot]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="videos is already there"):
        make_clips(made[0], clips=2)
    with pytest.raises(ValueError, match="--clips must be at least 1, found 0"):
        make_clips(tmp_path, clips=0)
