"""SAT's 3d-vae.pt: there and back bit by bit, the same pixels as diffusers, nothing executed and nothing overlooked."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file
from torch import Tensor

from cogvideo_dist.convert import diffusers as hf
from cogvideo_dist.convert import sat
from cogvideo_dist.convert.vae_names import vae_names
from cogvideo_dist.models.vae import VAE, VAEConfig
from tests.launch.world import outcome

CONFIG = VAEConfig(block_out_channels=(4, 4, 8, 8), norm_groups=2, latent_channels=4, layers_per_block=1)


def random_vae(dtype: torch.dtype = torch.float64) -> VAE:
    vae = VAE(CONFIG).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return vae


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    sat.save_vae(random_vae(), tmp_path / "3d-vae.pt")
    return tmp_path / "3d-vae.pt"


def change(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_there_and_back_is_bitwise(dtype: torch.dtype, tmp_path: Path) -> None:
    vae = random_vae(dtype)
    sat.save_vae(vae, tmp_path / "new" / "3d-vae.pt")
    again, left_out = sat.load_vae(tmp_path / "new" / "3d-vae.pt", CONFIG)
    assert left_out == {} and again.config == CONFIG
    for (name, found), expected in zip(again.named_parameters(), vae.parameters(), strict=True):
        assert found.dtype == dtype and torch.equal(found, expected), name
    sat.save_vae(again, tmp_path / "again.pt")
    first, second = (torch.load(tmp_path / path, weights_only=True) for path in ("new/3d-vae.pt", "again.pt"))
    assert list(first) == ["state_dict"] and list(first["state_dict"]) == list(second["state_dict"])
    assert all(torch.equal(a, b) for a, b in zip(*(x["state_dict"].values() for x in (first, second)), strict=True))


def test_the_file_has_the_names_of_sat(file: Path) -> None:
    tensors = torch.load(file, weights_only=True)["state_dict"]
    state = random_vae().state_dict()
    assert tensors.keys() == {row.sat for row in vae_names(CONFIG)}
    assert all(torch.equal(tensors[row.sat], state[row.ours]) for row in vae_names(CONFIG))
    assert tensors["decoder.up.2.block.0.norm1.conv_y.conv.weight"].shape == (8, 4, 1, 1, 1)
    assert tensors["encoder.down.2.block.0.nin_shortcut.weight"].shape == (8, 4, 1, 1, 1)


@torch.no_grad()
def test_diffusers_to_sat_and_back_gives_the_pixels_of_diffusers(tmp_path: Path) -> None:
    hf.save_vae(random_vae(), tmp_path / "vae")
    theirs: Any = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae", torch_dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    sat.save_vae(hf.load_vae(tmp_path / "theirs"), tmp_path / "3d-vae.pt")
    ours, _ = sat.load_vae(tmp_path / "3d-vae.pt", CONFIG)
    video = drawn(1, 3, 17, 16, 24).clamp(-1, 1)
    posterior, expected = ours.encode(video, "chunked"), theirs.encode(video).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=0, atol=1e-9)
    decoded, whole = ours.decode(expected.mean, "chunked"), ours.decode(expected.mean)
    torch.testing.assert_close(decoded, theirs.decode(expected.mean).sample, rtol=0, atol=1e-9)
    torch.testing.assert_close(whole, theirs.decoder(expected.mean)[0], rtol=0, atol=1e-9)


def test_what_belongs_to_the_loss_is_left_out_and_counted(file: Path) -> None:
    extra = {f"loss.perceptual_loss.lin{i}.weight": torch.zeros(2) for i in range(5)}
    change(file, lambda content: content["state_dict"].update(extra))
    change(file, lambda content: content.update(epoch=3))  # as Lightning has it
    vae, left_out = sat.load_vae(file, CONFIG)
    assert left_out == {"loss": 5}
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), random_vae().parameters(), strict=True))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["state_dict"].pop("encoder.conv_in.conv.bias"), "lacks tensor encoder.conv_in.conv.bias"),
        (lambda c: c["state_dict"].update(quant=torch.zeros(1)), "has the unknown tensor quant"),
        (lambda c: c["state_dict"].update({"lossy.x": torch.zeros(1)}), "has the unknown tensor lossy.x"),
        (
            lambda c: c["state_dict"].update({"encoder.norm_out.bias": torch.zeros(3)}),
            r"encoder.norm_out.bias has shape \(3,\), expected \(8,\)",
        ),
        (lambda c: c["state_dict"].update({"encoder.norm_out.bias": 3}), r"\['encoder.norm_out.bias'\] is no dense"),
        (
            lambda c: c["state_dict"].update({"encoder.norm_out.bias": torch.zeros(8).to_sparse()}),
            r"\['encoder.norm_out.bias'\] is no dense",
        ),
        (lambda c: c["state_dict"].update({7: torch.zeros(1)}), r"\[7\] is no dense"),
        (lambda c: c.pop("state_dict"), 'no dictionary "state_dict"'),
    ],
)
def test_what_does_not_fit_is_named(file: Path, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    change(file, edit)
    with pytest.raises(ValueError, match=message) as refusal:
        sat.load_vae(file, CONFIG)
    assert str(file) in str(refusal.value)


def test_the_shape_of_another_vae_is_refused_by_name(file: Path) -> None:
    with pytest.raises(ValueError, match=r"3d-vae.pt lacks tensors .* and \d+ more"):
        sat.load_vae(file, VAEConfig())


class Canary:
    """Unpickled the careless way, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "inside", "instead"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, place: str, zipped: bool) -> None:
    mark, file = tmp_path / "executed", tmp_path / "3d-vae.pt"
    sat.save_vae(random_vae(), file)
    content = torch.load(file, weights_only=True)
    canary = Canary(mark)
    if place == "inside":
        content["state_dict"]["loss.canary"] = canary
    content = {"beside": {**content, "canary": canary}, "inside": content, "instead": canary}[place]
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="3d-vae.pt: refused.*none of it was run"):
        sat.load_vae(file, CONFIG)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # so the canary does sing


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "3d-vae.pt"
    file.write_bytes(pickle.dumps(Canary(mark)))
    with pytest.raises(ValueError, match="3d-vae.pt: "):
        sat.load_vae(file, CONFIG)
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"no file of torch", None])
def test_a_damaged_or_absent_file_is_named(file: Path, content: bytes | None) -> None:
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match="3d-vae.pt: .*damaged"):
        sat.load_vae(file, CONFIG)
    file.unlink()
    with pytest.raises(ValueError, match="3d-vae.pt: no such file"):
        sat.load_vae(file, CONFIG)


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    return outcome("convert", importlib.import_module("launch.convert").main)


def test_the_command_goes_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hf.save_vae(random_vae(torch.float32), tmp_path / "vae")
    file, shape = tmp_path / "3d-vae.pt", tmp_path / "vae" / "config.json"
    assert convert(monkeypatch, "sat-vae", tmp_path / "vae", file)[0] == 0
    change(file, lambda content: content["state_dict"].update({"loss.x": torch.zeros(1)}))
    code, stdout, _ = convert(monkeypatch, "diffusers", file, tmp_path / "again", "--vae-config", shape)
    assert code == 0 and stdout.splitlines()[0].startswith("1 tensors of loss.* left out")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(shape.read_text())
    first, second = (load_file(tmp_path / folder / hf.WEIGHTS) for folder in ("vae", "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    options = ("native", file, tmp_path / "native", "--vae-config", shape, "--dtype", "bf16")
    assert convert(monkeypatch, *options)[0] == 0
    native, state = load_file(tmp_path / "native" / "weights.safetensors"), random_vae(torch.float32).state_dict()
    assert all(torch.equal(native[name], tensor.bfloat16()) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 78, "give --scaling-factor of its release, or --vae-config"),
        (("--scaling-factor", "0.7"), 1, "lacks tensors"),  # the released shape, which this one is not
        (("--scaling-factor", "-1"), 1, "scaling_factor is -1.0; it must be positive"),
    ],
)
def test_the_command_asks_for_what_a_file_does_not_say(
    monkeypatch: pytest.MonkeyPatch, file: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    found, _, stderr = convert(monkeypatch, "diffusers", file, file.parent / "out", *options)
    assert (found, message in stderr.splitlines()[-1]) == (code, True), stderr


def test_the_command_takes_no_second_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hf.save_vae(random_vae(), tmp_path / "vae")
    code, _, stderr = convert(monkeypatch, "native", tmp_path / "vae", tmp_path / "out", "--scaling-factor", "0.7")
    assert (code, "are for a 3d-vae.pt alone" in stderr.splitlines()[-1]) == (78, True)
