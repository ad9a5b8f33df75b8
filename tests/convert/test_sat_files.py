"""Files of SAT that are hostile or damaged: no code of theirs is run, and every refusal is one line that names the file."""

from __future__ import annotations

import pickle
import random
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_dist.convert import sat
from tests.convert.test_sat import CONFIG, fine_tuned, random_vae, same


@pytest.fixture
def file(tmp_path: Path) -> Path:
    sat.save_vae(random_vae(), tmp_path / "3d-vae.pt")
    return tmp_path / "3d-vae.pt"


class Canary:
    """Unpickled the careless way, it writes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["state_dict", "module"])
@pytest.mark.parametrize("place", ["beside", "inside", "instead"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, place: str, wrapper: str, zipped: bool
) -> None:
    mark, file = tmp_path / "executed", tmp_path / "3d-vae.pt"
    content: Any = fine_tuned(random_vae())
    content[wrapper] = content.pop("module")
    canary = Canary(mark)
    if place == "inside":
        content[wrapper]["loss.canary"] = canary
    content = {"beside": {**content, "canary": canary}, "inside": content, "instead": canary}[place]
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"3d-vae.pt: refused, .*\bexec, of which nothing was run") as refusal:
        sat.load_vae(file, CONFIG)
    assert len(str(refusal.value).splitlines()) == 1
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists()  # so the canary does sing


def test_a_bare_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "3d-vae.pt"
    file.write_bytes(pickle.dumps(Canary(mark)))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="3d-vae.pt: "):
        warnings.simplefilter("error")
        sat.load_vae(file, CONFIG)
    assert not mark.exists()


class Borrowed:
    """Unpickled, it calls what the reader lets through, with arguments of its own."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, ("open('executed', 'w')",), {"state": 1}


@pytest.mark.parametrize("place", ["beside", "weight"])
def test_what_is_let_through_for_the_state_of_a_generator_does_nothing(file: Path, place: str) -> None:
    import numpy

    content = torch.load(file, weights_only=True)
    for function in (numpy.dtype, numpy.ndarray):
        if place == "beside":
            content["np_rng_state"] = Borrowed(function)
        else:
            content["state_dict"]["encoder.norm_out.bias"] = Borrowed(function)
        torch.save(content, file)
        if place == "beside":
            same(sat.load_vae(file).vae, random_vae())
        else:
            with pytest.raises(ValueError, match="encoder.norm_out.bias is no dense tensor"):
                sat.load_vae(file)


@pytest.mark.parametrize("content", [b"", b"no file of torch", None])
def test_a_damaged_or_absent_file_is_named(file: Path, content: bytes | None) -> None:
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match=r"3d-vae.pt: damaged, or no file of torch \(.*\); get it again"):
        sat.load_vae(file, CONFIG)
    file.unlink()
    with pytest.raises(ValueError, match="3d-vae.pt: no such file"):
        sat.load_vae(file, CONFIG)


def test_something_else_than_a_dictionary_is_named(file: Path) -> None:
    torch.save([torch.zeros(1)], file)
    with pytest.raises(ValueError, match="3d-vae.pt: holds a list, expected a dictionary with state_dict or module"):
        sat.load_vae(file)


@pytest.mark.parametrize("draws", [6, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("zipped", [True, False])
def test_wherever_a_file_is_cut_or_changed_it_is_refused_in_one_line_or_the_same(
    file: Path, zipped: bool, draws: int
) -> None:
    """The older format has no checksums, so there a changed weight may pass."""
    torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=zipped)
    whole, draw, refused = file.read_bytes(), random.Random(0), 0
    starts = list(range(0, len(whole), len(whole) // 6))
    for _ in range(draws):
        starts += [draw.randrange(len(whole)), draw.randrange(len(whole) - 4000, len(whole)), draw.randrange(4000)]
    for start in starts:
        cut = whole[:start] if draw.random() < 0.3 else whole[:start] + bytes([whole[start] ^ 4]) + whole[start + 1 :]
        file.write_bytes(cut)
        try:
            found = sat.load_vae(file)
        except ValueError as error:
            refused += 1
            assert str(file) in str(error) and len(str(error).splitlines()) == 1, error
        else:
            assert len(cut) == len(whole)
            if zipped:
                same(found.vae, random_vae())
    assert refused > len(starts) / 4


def test_a_released_file_of_zipped_records_is_not_read_into_memory(file: Path) -> None:
    """What lies beside the VAE stays where it is: a text encoder of ten gigabytes is no reason to have twenty."""
    assert zipfile.is_zipfile(file)
    content = torch.load(file, weights_only=True)
    content["module"] = {f"first_stage_model.{name}": tensor for name, tensor in content.pop("state_dict").items()}
    content["module"]["conditioner.weight"] = torch.zeros(2**25)
    torch.save(content, file)
    before = resident()
    found = sat.load_vae(file)
    assert found.left_out == {"conditioner": 1}
    assert resident() - before < 2**26


def resident() -> int:
    """Bytes of this process's own memory, without files that are mapped."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024
