"""launch/sample.py: what it takes, what it makes of it, and that ranks make the same."""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cogvideo_dist.config.load import ConfigError
from cogvideo_dist.config.schema import Sampling
from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert.scheduler import scheduler_config
from cogvideo_dist.diffusion.schedule import ScheduleConfig
from cogvideo_dist.evaluation.media import write_mp4
from cogvideo_dist.models.dit import DiT
from cogvideo_dist.models.init import draw_parameters
from cogvideo_dist.models.presets import PRESETS
from cogvideo_dist.parallel.mesh import Layout, Place
from launch import sample
from launch.compose import load_vae
from launch.sampling_inputs import Request, image_of, read_requests, seeds_of, video_of
from launch.sampling_setup import sampling_layout
from tests.launch.commands import LAUNCHERS, ROOT, TIMEOUT_S, environment
from tests.launch.world import LENGTH, World, outcome
from tests.ranks import free_port

CPU = torch.device("cpu")
SIZES = {"heads": 2, "head_dim": 16, "layers": 2, "time_embed_dim": 16, "text_dim": 16, "text_length": LENGTH,
         "sample_frames": 3, "sample_height": 4, "sample_width": 4}  # fmt: skip


def released(world: World, name: str, folder: Path) -> Path:
    """A folder of the public layout with an untrained tiny model all of whose gates are open."""
    model = DiT(replace(PRESETS[name], **SIZES))
    draw_parameters(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    hf.save_pipeline(
        folder, transformer=model, vae=load_vae(str(world.root / "vae"), CPU), text=world.root / "text",
        scheduler=scheduler_config(ScheduleConfig(), "ddim"),
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def for_text(world: World) -> Path:
    return released(world, "cogvideox-5b", world.root / "for-text")


@pytest.fixture(scope="module")
def for_images(world: World) -> Path:
    folder = released(world, "cogvideox1.5-5b-i2v", world.root / "for-images")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "CogVideoXImageToVideoPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


SHORT = ("--steps", 3, "--sampler", "ddim", "--size", 9, 32, 32, "--guidance-kind", "constant", "--guidance", 2)


def run(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, out: Path, *options: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command, in this process."""
    arguments = ["sample.py", "--checkpoint", checkpoint, "--out", out, *SHORT, *options]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    return outcome("sample", sample.main)


def frames_of(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def save_image(path: Path, *, shift: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    picture = torch.stack([(7 * x + shift) % 256, (5 * y + shift) % 256, (x + y) % 256], dim=-1).to(torch.uint8)
    Image.fromarray(picture.numpy()).save(path)
    return path


def test_a_line_for_every_video_and_one_for_all(
    monkeypatch: pytest.MonkeyPatch, for_text: Path, tmp_path: Path
) -> None:
    code, stdout, stderr = run(
        monkeypatch, for_text, tmp_path / "out", "--prompt", "A cat.", "--prompt", "A dog.", "--seed", 7
    )
    assert code == 0, stderr
    first, second, last = stdout.splitlines()
    figure = r"[\d.e+-]+"
    for number, line in enumerate((first, second)):
        assert re.fullmatch(
            rf"{tmp_path}/out/prompt-0{number}.mp4: 9 frames of 32 x 32, seed {7 + number}, 3 steps of {figure} s, decoded in "
            rf"{figure} s, peak memory {figure} GB",
            line,
        )
    size = sum(p.numel() for p in hf.load_transformer(for_text / "transformer").parameters()) * 4 / 1e6
    weights = rf"the transformer's weights are {size:.1f} MB \(float32\)"
    assert re.fullmatch(rf"{tmp_path}/out/contact-sheet.png: 2 videos in {figure} s; {weights}", last)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "prompt-00.mp4",
        "prompt-01.mp4",
        "contact-sheet.png",
    }


def test_a_video_depends_on_its_own_prompt_and_seed_alone(
    monkeypatch: pytest.MonkeyPatch, for_text: Path, tmp_path: Path
) -> None:
    lines = [
        {"prompt": "A cat.", "seed": 3},
        {"prompt": "A long prompt of many words about a dog."},
        {"prompt": "A cat.", "seed": 4},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    code, stdout, stderr = run(
        monkeypatch, for_text, tmp_path / "all", "--prompts-file", tmp_path / "prompts.jsonl", "--seed", 20
    )
    assert code == 0, stderr
    assert re.findall(r"seed (\d+)", stdout) == ["3", "21", "4"]
    assert run(monkeypatch, for_text, tmp_path / "one", "--prompt", "A cat.", "--seed", 4)[0] == 0
    alone, third, first = (
        (tmp_path / name).read_bytes() for name in ("one/prompt-00.mp4", "all/prompt-02.mp4", "all/prompt-00.mp4")
    )
    assert alone == third
    assert alone != first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{prompt: A cat.}", "not valid JSON"),
        ('["A cat."]', 'expected an object such as {"prompt": "A cat.", "seed": 1}, found ["A cat."]'),
        ('{"seed": 1}', "prompt must be text, found None"),
        ('{"prompt": " "}', "prompt must be text, found ' '"),
        ('{"prompt": "a", "sed": 1}', "unknown key 'sed'; known are prompt, seed, image, video"),
        ('{"prompt": "a", "seed": true}', "seed must be an integer in [0, 2^63), found True"),
        ('{"prompt": "a", "seed": -1}', "seed must be an integer in [0, 2^63), found -1"),
        ('{"prompt": "a", "seed": null}', "seed must be an integer in [0, 2^63), found None"),
        ('{"prompt": "a", "image": 3}', "image must be the path of a file, found 3"),
        ('{"prompt": "a", "video": "none.mp4"}', "none.mp4: [Errno 2] No such file or directory"),
        ('{"prompt": "a", "image": "picture.png"}', "makes videos of text alone and takes no image"),
    ],
)
def test_a_wrong_line_is_named(
    monkeypatch: pytest.MonkeyPatch, for_text: Path, tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "A cat."}}\n\n{line}\n')
    code, stdout, stderr = run(monkeypatch, for_text, tmp_path / "out", "--prompts-file", path)
    assert (code, stdout) == (78, "")
    assert stderr.startswith(f"sample: error: {path}:3: ")
    assert message in stderr
    assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_plain_text_is_a_prompt_a_line_and_files_count_from_their_folder(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("  A cat. \n\n{not json}\n")
    found = read_requests(["First."], str(tmp_path / "p.txt"), image="all.png")
    assert [request.prompt for request in found] == ["First.", "A cat.", "{not json}"]
    assert [request.origin for request in found] == ["--prompt", f"{tmp_path}/p.txt:1", f"{tmp_path}/p.txt:3"]
    assert seeds_of(found, first=5) == [5, 6, 7]
    assert {request.image for request in found} == {Path("all.png")}
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "image": "own.png", "video": "/v.mp4"}\n{"prompt": "b"}')
    first, second = read_requests([], str(tmp_path / "p.jsonl"), image="all.png")
    assert (first.image, first.video) == (tmp_path / "own.png", Path("/v.mp4"))
    assert (second.image, second.video) == (Path("all.png"), None)


def test_an_image_is_scaled_down_to_cover_and_cut_around_its_middle(tmp_path: Path) -> None:
    settings = Sampling(size=(9, 32, 32))
    exact = image_of(Request("a", image=save_image(tmp_path / "exact.png")), settings)
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "exact.png")))
    assert exact is not None
    assert torch.equal(exact, picture.permute(2, 0, 1) / 127.5 - 1)
    Image.fromarray(torch.cat([255 - picture[:, :16], picture, 255 - picture[:, :16]], dim=1).numpy()).save(
        tmp_path / "wide.png"
    )
    wide = image_of(Request("a", image=tmp_path / "wide.png"), settings)
    assert wide is not None
    assert torch.equal(wide, exact)
    with pytest.raises(
        ConfigError, match=r"--prompt: .*small.png: 16 x 32 pixels would have to be enlarged to 32 x 32"
    ):
        image_of(Request("a", image=save_image(tmp_path / "small.png", size=(16, 32))), settings)


def test_an_image_begins_the_video_of_a_model_that_takes_one(
    monkeypatch: pytest.MonkeyPatch, for_images: Path, tmp_path: Path
) -> None:
    one, other = (save_image(tmp_path / f"{shift}.png", shift=shift) for shift in (0, 100))
    prompt = ("--prompt", "A cat.")
    for name, image in (("one", one), ("again", one), ("other", other)):
        code, _, stderr = run(monkeypatch, for_images, tmp_path / name, *prompt, "--image", image)
        assert code == 0, stderr
    scaled = run(monkeypatch, for_images, tmp_path / "none", *prompt, "--image", one, "--image-scale", "none")
    assert scaled[0] == 0
    videos = {name: (tmp_path / name / "prompt-00.mp4").read_bytes() for name in ("one", "again", "other", "none")}
    assert videos["one"] == videos["again"]
    assert len(set(videos.values())) == 3
    code, _, stderr = run(monkeypatch, for_images, tmp_path / "without", *prompt)
    assert code == 78
    assert "--prompt: this model continues an image; give the first frame" in stderr


def test_a_video_is_taken_up_with_a_strength(monkeypatch: pytest.MonkeyPatch, for_text: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "A cat.", "--seed", 3)
    assert run(monkeypatch, for_text, tmp_path / "new", *prompt)[0] == 0
    source = tmp_path / "new" / "prompt-00.mp4"
    for strength, steps in ((0.34, 1), (0.7, 2), (1.0, 3)):
        code, stdout, stderr = run(
            monkeypatch, for_text, tmp_path / f"{strength}", *prompt, "--video", source, "--strength", strength
        )
        assert code == 0, stderr
        assert f" {steps} steps of " in stdout
    assert (tmp_path / "1.0" / "prompt-00.mp4").read_bytes() == source.read_bytes()
    assert (tmp_path / "0.7" / "prompt-00.mp4").read_bytes() != source.read_bytes()
    pixels = video_of(Request("a", video=source), Sampling(size=(9, 32, 32), fps=8))
    assert pixels is not None
    assert torch.equal(pixels, frames_of(source))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strength", 0.5), "--strength says how much of a video is made anew; give one with --video"),
        (
            ("--video", "SOURCE", "--strength", 0.1),
            "--strength: strength 0.1 leaves none of 3 steps to do; use at least 0.333",
        ),
        (("--video", "SOURCE", "--strength", 2), "--strength: strength must be above 0 and at most 1, found 2"),
        (("--video", "SOURCE", "--size", 17, 32, 32), "lasts 1.125 s, too short for 17 frames at 8 per second"),
        (("--sp", 2), "--sp 2 x --tp 1 are not the number of ranks started, 1"),
        (("--guidance-parallel",), "x 2 branches of --guidance-parallel are not the number of ranks started, 1"),
        (("--cp", 2), "--cp 2 does not divide the 1 ranks that decode"),
        (("--preview-every", 0), "--preview-every 0: the number of steps must be at least 1"),
        (("--image", "SOURCE"), "makes videos of text alone and takes no image"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_sampled(
    monkeypatch: pytest.MonkeyPatch, for_text: Path, tmp_path: Path, options: Sequence[Any], message: str
) -> None:
    source = tmp_path / "source.mp4"
    write_clip(source)
    given = [source if option == "SOURCE" else option for option in options]
    code, stdout, stderr = run(monkeypatch, for_text, tmp_path / "out", "--prompt", "A cat.", *given)
    assert (code, stdout) == (78, "")
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def write_clip(path: Path) -> None:
    t, y, x = torch.meshgrid(torch.arange(9), torch.arange(32), torch.arange(32), indexing="ij")
    write_mp4(path, torch.stack([9 * t + y, 3 * x + t, x + y], dim=-1).to(torch.uint8), 8)


def options_of(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **({"guidance_parallel": False, "sp": None, "ulysses": None, "ring": None, "tp": 1} | given)
    )


@pytest.mark.parametrize(
    ("given", "layout"),
    [
        ({}, Layout(ulysses=8)),
        ({"guidance_parallel": True}, Layout(dp=2, ulysses=4)),
        ({"guidance_parallel": True, "ring": 2}, Layout(dp=2, ring=2, ulysses=2)),
        ({"ulysses": 2, "ring": 4}, Layout(ring=4, ulysses=2)),
        ({"tp": 2, "sp": 4, "ulysses": 1}, Layout(ring=4, tp=2)),
        ({"tp": 2, "guidance_parallel": True}, Layout(dp=2, ulysses=2, tp=2)),
    ],
)
def test_ranks_are_dealt_to_branches_tokens_and_features(given: dict[str, Any], layout: Layout) -> None:
    assert sampling_layout(options_of(**given), Place(0, 8, node=8), heads=48) == layout


@pytest.mark.parametrize(
    "given", [{"sp": 3}, {"tp": 3}, {"guidance_parallel": True, "sp": 8}, {"ulysses": 3}, {"ring": 0}]
)
def test_ranks_that_do_not_come_out_even_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ranks"):
        sampling_layout(options_of(**given), Place(0, 8, node=8), heads=48)


def test_a_running_sample_can_be_looked_at(monkeypatch: pytest.MonkeyPatch, for_text: Path, tmp_path: Path) -> None:
    prompt = ("--prompt", "A cat.")
    assert run(monkeypatch, for_text, tmp_path / "plain", *prompt)[0] == 0
    assert run(monkeypatch, for_text, tmp_path / "watched", *prompt, "--preview-every", 1)[0] == 0
    preview = Image.open(tmp_path / "watched" / "prompt-00.preview.png")
    assert preview.size == (32, 32)
    assert len({pixel for _, pixel in preview.getcolors(32 * 32) or []}) > 10
    assert not list((tmp_path / "plain").glob("*.preview.png"))
    assert (tmp_path / "watched/prompt-00.mp4").read_bytes() == (tmp_path / "plain/prompt-00.mp4").read_bytes()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_in_8_bits_are_sampled(
    monkeypatch: pytest.MonkeyPatch, for_text: Path, tmp_path: Path, kind: str
) -> None:
    prompt = ("--prompt", "A cat.")
    plain = run(monkeypatch, for_text, tmp_path / "plain", *prompt, "--precision", "bf16")
    eight = run(monkeypatch, for_text, tmp_path / kind, *prompt, "--precision", "bf16", "--quantize", kind)
    assert plain[0] == eight[0] == 0, eight[2]
    assert " MB (bfloat16)\n" in plain[1]
    assert f" MB ({kind})\n" in eight[1]
    ours, theirs = (frames_of(tmp_path / name / "prompt-00.mp4").float() for name in (kind, "plain"))
    assert 10 * math.log10(255**2 / float((ours - theirs).square().mean() + 1e-9)) >= 30


@pytest.mark.long  # two more starts of every library; tests/tasks/test_sampling_ranks.py has the layouts
@pytest.mark.parametrize(
    ("launcher", "options"), [("torchrun", ("--guidance-parallel", "--cp", "2")), ("deepspeed", ("--ulysses", "2"))]
)
def test_ranks_of_a_launcher_make_the_files_of_one_process(
    monkeypatch: pytest.MonkeyPatch, for_text: Path, tmp_path: Path, launcher: str, options: Sequence[str]
) -> None:
    common = ("--prompt", "A cat.", "--prompt", "A dog.", "--vae-semantics", "whole", "--preview-every", "2")
    code, _, stderr = run(monkeypatch, for_text, tmp_path / "one", *common)
    assert code == 0, stderr
    arguments = ["--checkpoint", for_text, "--out", tmp_path / "two", *SHORT, *common, *options]
    done = subprocess.run(
        [*LAUNCHERS[launcher], str(free_port()), str(ROOT / "launch" / "sample.py"), *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(str(tmp_path))]
    assert len(lines) == 3, "one rank speaks"
    assert lines[-1].endswith("on each of 2 ranks")
    files = ("prompt-00.mp4", "prompt-01.mp4")
    for ours, theirs in ((frames_of(tmp_path / name / file).float() for name in ("two", "one")) for file in files):
        # What differs by 1e-6 may be rounded to another whole number, which the codec spreads.
        assert (ours - theirs).abs().mean() < 0.05
        assert theirs.std() > 1
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
