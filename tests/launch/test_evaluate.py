"""The evaluation command against a plain computation, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import load_config, to_yaml
from cogvideo_dist.data.catalog import Catalog
from cogvideo_dist.data.plan import Plan
from cogvideo_dist.data.shards import ShardReader
from cogvideo_dist.engine.manifest import Saved
from cogvideo_dist.evaluation.reconstruction import latent_sums, reconstruction_sums
from cogvideo_dist.models.perceptual import Perceptual
from cogvideo_dist.rng import fold
from launch import evaluate
from launch.autoencoder import build_vae
from launch.compose import LatentGeometry, load_vae
from launch.evaluate_report import Evaluation, Measured, show, write_report
from tests.data.test_decode import decode, image
from tests.engine.saved_states import commit
from tests.launch.test_train_vae import CONFIG
from tests.launch.world import World, outcome

SIZES = ["--size", "9,32,32", "--size", "1,32,32"]


def command(vae: Path, shards: Path, out: Path, *more: str) -> tuple[int, str, str]:
    arguments = ["vae", "--vae", str(vae), "--shards", str(shards), "--out", str(out), *more]
    return outcome("evaluate", lambda: evaluate.main(arguments))


def report(out: Path) -> dict[str, Any]:
    """evaluation.json, of numbers that JSON has."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads((out / "evaluation.json").read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def done(world: World) -> tuple[Path, str]:
    """(folder, stdout)"""
    out = world.root / "evaluation"
    code, stdout, stderr = command(world.root / "vae", world.root / "shards", out, *SIZES, "--semantics", "chunked")
    assert code == 0, stderr
    return out, stdout


@pytest.fixture(scope="module")
def run(world: World) -> Path:
    """A run with one checkpoint, whose averaged weights are half of its last."""
    folder = world.root / "evaluated-run"
    file = world.root / "evaluated.yaml"
    file.write_text(CONFIG.replace("WORLD", str(world.root)))
    config = load_config(VAERun, [file], overrides=[f"run.dir={folder}"])
    weights = {name: p.detach() for name, p in build_vae(config).named_parameters()}
    ema = {name: tensor / 2 for name, tensor in weights.items()}
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    commit(folder / "ckpt", {"weights": weights, "ema": ema}, saved=Saved(7, 2, {}, {}))
    return folder


def test_numbers_are_those_of_a_plain_computation(world: World, done: tuple[Path, str]) -> None:
    found = report(done[0])
    vae, reader = load_vae(str(world.root / "vae"), torch.device("cpu")), ShardReader(world.root / "shards")
    assert [clip["key"] for clip in found["clips"]] == [record.key for record in reader.records]
    noises = []
    for clip, record in zip(found["clips"], reader.records):
        if record.kind == "image":
            pixels = image(reader.read(record, "png"), size=(32, 32))
        else:
            pixels = decode(reader.read(record, "mp4"), frames=9, size=(32, 32))
        video = (pixels.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            output = vae.decode(vae.encode(video, "chunked").mean, "chunked")
        x, y = (((v[0].double().clamp(-1, 1) + 1) / 2).permute(1, 2, 3, 0).numpy() for v in (video, output))
        noise = [peak_signal_noise_ratio(a, b, data_range=1) for a, b in zip(x, y)]
        similar = [
            structural_similarity(
                a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1
            )
            for a, b in zip(x, y)
        ]
        assert clip["psnr"] == pytest.approx(np.mean(noise), abs=1e-4)
        assert clip["ssim"] == pytest.approx(np.mean(similar), abs=1e-5)
        for name, frames in (("original", x), ("reconstruction", y)):
            expected = 255 * np.abs(np.diff(frames, axis=0)).mean() if len(frames) > 1 else None
            assert clip.get(f"flicker/{name}") == (None if expected is None else pytest.approx(expected, abs=1e-3))
        noises += noise
    assert found["total"]["psnr"] == pytest.approx(np.mean(noises), abs=1e-4)
    assert found["total"]["clips"] == len(reader.records)
    assert len(found["latents"]["channel_std"]) == 16


def test_the_report_says_what_was_used_and_needs_no_network(done: tuple[Path, str]) -> None:
    out, stdout = done
    used = report(out)["used"]
    assert (used["semantics"], used["sizes"], used["fps"]) == ("chunked", [[9, 32, 32], [1, 32, 32]], 8)
    assert (len(used["vae"]["sha256"]), len(used["index"])) == (64, 32)
    assert used["lpips"] is None
    page = (out / "evaluation.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert page.count("<svg") == 3
    assert "data:image/png;base64," in page
    assert (out / "contact-sheet.png").stat().st_size > 0
    for name in ("worst", "best"):
        assert any((out / f"{name}.{kind}").exists() and f'src="{name}.{kind}"' in page for kind in ("mp4", "png"))
    assert "all 8" in stdout
    assert f"report: {out / 'evaluation.html'}" in stdout


def test_a_run_is_measured_on_the_clips_that_it_held_out(world: World, run: Path, tmp_path: Path) -> None:
    code, _, stderr = command(run, world.root / "shards", tmp_path)
    assert code == 0, stderr
    config = load_config(VAERun, [run / "config.yaml"])
    reader = ShardReader(world.root / "shards")
    plan = Plan(Catalog([reader.records]), config.data, seed=config.run.seed, geometry=LatentGeometry())
    found = report(tmp_path)
    assert [clip["key"] for clip in found["clips"]] == [reader.records[slot.index].key for slot in plan.held_out]
    assert (found["used"]["clips"], found["used"]["vae"]["step"]) == ("held-out", 7)
    assert found["used"]["vae"]["weights"] == "ema"


def test_last_weights_all_clips_and_a_count_may_be_asked_for(world: World, run: Path, tmp_path: Path) -> None:
    digests = set()
    for weights in ("raw", "ema"):
        more = ("--weights", weights, "--clips", "all", "--count", "1")
        code, _, stderr = command(run, world.root / "shards", tmp_path, *more)
        assert code == 0, stderr
        assert [clip["key"] for clip in report(tmp_path)["clips"]] == ["00000000"]
        digests.add(report(tmp_path)["used"]["vae"]["sha256"])
    assert len(digests) == 2


def test_clips_that_fit_no_size_are_listed_with_reasons(world: World, tmp_path: Path) -> None:
    code, stdout, stderr = command(world.root / "vae", world.root / "shards", tmp_path, "--size", "9,32,32")
    assert code == 0, stderr
    assert [defect["source"] for defect in report(tmp_path)["unused"]] == ["images/still 0.png", "images/still 1.png"]
    assert "2 samples could not be used; the first, images/still 0.png: no size for an image" in stdout


def test_lpips_is_measured_over_the_file_that_is_given(world: World, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in torchvision.models.alexnet().features.named_parameters("features")}
    torch.save(
        {name: torch.randn(s, generator=fold(0, name)) * 0.05 for name, s in shapes.items()}, tmp_path / "alex.pth"
    )
    more = ("--size", "9,32,32", "--count", "2", "--lpips", str(tmp_path / "alex.pth"), "--lpips-net", "alex")
    code, stdout, stderr = command(world.root / "vae", world.root / "shards", tmp_path, *more)
    assert code == 0, stderr
    found, vae = report(tmp_path), load_vae(str(world.root / "vae"), torch.device("cpu"))
    assert len(found["used"]["lpips"]["sha256"]) == 64
    assert not found["warning"]
    assert "untrained" not in stdout
    theirs = Perceptual("alex", weights=tmp_path / "alex.pth")
    reader = ShardReader(world.root / "shards")
    for clip in found["clips"]:
        record = next(record for record in reader.records if record.key == clip["key"])
        pixels = decode(reader.read(record, "mp4"), frames=9, size=(32, 32))
        video = (pixels.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            distance = theirs(vae.decode(vae.encode(video).mean).clamp(-1, 1), video)
        assert clip["lpips"] == pytest.approx(float(distance) / 9, rel=1e-4)


def test_an_untrained_lpips_says_so_everywhere(world: World, tmp_path: Path) -> None:
    more = (*SIZES, "--count", "1", "--lpips", "random")
    code, stdout, stderr = command(world.root / "vae", world.root / "shards", tmp_path, *more)
    assert code == 0, stderr
    assert report(tmp_path)["used"]["lpips"] == {"network": "vgg", "backbone": "random"}
    for text in (stdout, report(tmp_path)["warning"], (tmp_path / "evaluation.html").read_text()):
        assert "untrained network" in text


def test_a_perfect_clip_is_infinite_in_words(tmp_path: Path) -> None:
    clip = torch.rand(3, 5, 16, 16, generator=fold(0, "clip")) * 2 - 1
    latents = latent_sums(torch.ones(1, 16, 2, 2, 2), torch.zeros(1, 16, 2, 2, 2), bounds=(-30, 20))
    measured = Measured("a", "a.mp4", "A clip.", (5, 16, 16), {**reconstruction_sums(clip, clip), **latents})
    about = {
        "vae": {"folder": "vae", "scaling_factor": 0.7}, "shards": "shards", "sizes": [(5, 16, 16)], "fps": 8.0,
        "semantics": "whole", "clips": "all", "lpips": None, "device": "cpu", "torch": "",
    }  # fmt: skip
    write_report(tmp_path, Evaluation(about, (measured,), (show(measured, clip, reconstruction=clip),), ()))
    found = report(tmp_path)
    assert found["total"]["psnr"] == found["clips"][0]["psnr"] == "inf"
    assert float(found["total"]["psnr"]) == float("inf")
    assert found["latents"]["scaling_factor"] == pytest.approx(1)


REFUSED = {
    ("--size", "17,256"): "--size 17,256: expected FRAMES,HEIGHT,WIDTH",
    ("--size", "8,32,32"): r"--size: [8, 32, 32] is not a legal",
    ("--lpips", "nowhere.pth"): "nowhere.pth are no file",
    ("--clips", "held-out"): "needs a run that held clips out",
    ("--count", "0"): "count must be above 0, found 0",
    ("--fps", "0"): "fps must be above 0, found 0",
    ("--size", "17,256,256"): "none of the 8 samples of",
    ("--vae", "nowhere"): "nowhere is neither a run",
    ("--shards", "nowhere"): "nowhere/index.json: no such file",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_what_cannot_be_evaluated_ends_in_one_line(world: World, tmp_path: Path, arguments: tuple[str, str]) -> None:
    code, stdout, stderr = command(world.root / "vae", world.root / "shards", tmp_path / "out", *arguments)
    lines = stderr.strip().splitlines()
    assert code != 0
    assert not stdout
    assert lines[-1].startswith("evaluate: error: ")
    assert REFUSED[arguments] in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02}q\x00."], ids=["empty", "text", "no tensors"])
def test_a_damaged_lpips_file_is_named(world: World, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    more = (*SIZES, "--lpips", str(tmp_path / name))
    code, _, stderr = command(world.root / "vae", world.root / "shards", tmp_path / "out", *more)
    last = stderr.strip().splitlines()[-1]
    assert code != 0
    assert last.startswith("evaluate: error: ")
    assert str(tmp_path / name) in last


def test_a_run_of_a_transformer_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(world.config(tmp_path)))
    code, _, stderr = command(tmp_path, world.root / "shards", tmp_path / "out")
    assert code != 0
    assert "is not a run of launch/train_vae.py" in stderr


def test_help_has_an_example() -> None:
    code, stdout, _ = outcome("evaluate", lambda: evaluate.main(["vae", "--help"]))
    assert code == 0
    assert "python launch/evaluate.py vae --vae runs/demo/vae" in stdout
