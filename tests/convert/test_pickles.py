"""Foreign pickles that are hostile, in every format that is read: nothing of them is run, and each is reported in one line."""

from __future__ import annotations

import functools
import io
import operator
import os
import pickle
import posix
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.runtime.fp16.loss_scaler as scalers
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from cogvideo_dist.convert import pickles, sat
from cogvideo_dist.convert.pickles import Limits, Odd, Stored, open_file, read_tensors
from cogvideo_dist.convert.sat_dit import load_dit
from tests.convert import sat_writer
from tests.convert.sat_writer import sizes_of


class Call:
    """Unpickled the careless way, it calls ``function``."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.function, self.arguments) + (() if self.state is None else (self.state,))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def touch(mark: Path) -> str:
    return f"open({str(mark)!r}, 'w').close()"


PAYLOADS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "exec": (lambda mark: Call(exec, touch(mark)), r"\bexec"),
    "eval": (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), r"\beval"),
    "open": (lambda mark: Call(open, str(mark), "w"), r"\bopen"),
    "system": (lambda mark: Call(posix.system, f"touch {mark}"), r"posix.system"),
    "popen": (lambda mark: Call(os.popen, f"touch {mark}"), r"os.popen"),
    "getattr": (lambda mark: Call(getattr, Call(__import__, "os"), "system"), "__import__|getattr"),
    "partial": (lambda mark: Call(functools.partial, exec, touch(mark)), r"functools.partial"),
    "caller": (lambda mark: Call(operator.methodcaller, "__call__"), "operator.methodcaller"),
    "nested": (lambda mark: Call(torch.storage._load_from_bytes, saved(Call(exec, touch(mark)))), "_load_from_bytes"),
    "load": (lambda mark: Call(torch.load, io.BytesIO(saved(Call(exec, touch(mark))))), "torch.*load|BytesIO"),
    "inside": (lambda mark: [{"a": (1, [Call(exec, touch(mark))])}], r"\bexec"),
    "as a state": (lambda mark: Call(torch.nn.Linear, 1, 1, state={"x": Call(exec, touch(mark))}), r"\bexec|torch.nn.*Linear"),
    "through a stand-in": (lambda mark: Call(scalers.LossScaler, Call(exec, touch(mark))), r"\bexec"),
    "a stand-in's state": (lambda mark: Call(fragment_address, 1, 2, state={"x": Call(exec, touch(mark))}), r"\bexec"),
}  # fmt: skip


def rank_file(folder: Path, payload: Any) -> tuple[Path, Callable[[], Any]]:
    target = sat_writer.write(folder, sat_writer.drawn(sat_writer.shapes_of(sizes_of("5b")), torch.bfloat16))
    return spoiled(target / "mp_rank_00_model_states.pt", payload), lambda: load_dit(folder)


def lora_file(folder: Path, payload: Any) -> tuple[Path, Callable[[], Any]]:
    sizes = sizes_of("5b")
    weights = sat_writer.drawn(sat_writer.shapes_of(sizes), torch.bfloat16)
    target = sat_writer.write(folder, sat_writer.with_lora(weights, sizes, 2, torch.bfloat16))
    file = target / "mp_rank_00_model_states.pt"
    return spoiled(file, payload, within=("module", "model.diffusion_model.matrix_C")), lambda: load_dit(folder)


def optimizer_file(folder: Path, payload: Any) -> tuple[Path, Callable[[], Any]]:
    file, read = rank_file(folder, None)
    optim = file.parent / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": {"zero_stage": 1, "loss_scaler": payload}}, optim)
    return optim, read


def divided_model_file(folder: Path, payload: Any) -> tuple[Path, Callable[[], Any]]:
    optim, read = optimizer_file(folder, None)
    (optim.parent / "mp_rank_00_model_states.pt").unlink()
    file = optim.parent / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {}, "param_shapes": [payload]}, file)
    return file, read


def vae_file(folder: Path, payload: Any) -> tuple[Path, Callable[[], Any]]:
    folder.mkdir()
    torch.save({"state_dict": {"encoder.conv_in.conv.weight": payload}}, folder / "3d-vae.pt")
    return folder / "3d-vae.pt", lambda: sat.load_vae(folder / "3d-vae.pt")


FORMATS = {
    "mp_rank": rank_file, "lora": lora_file, "zero optim": optimizer_file, "zero model": divided_model_file, "vae": vae_file,
}  # fmt: skip


def spoiled(file: Path, payload: Any, within: tuple[str, str] | None = None) -> Path:
    content = torch.load(file, weights_only=True)
    place = content[within[0]] if within else content
    place[within[1] if within else "random_rng_state"] = payload
    torch.save(content, file)
    return file


ALWAYS = ("exec", "nested", "inside", "through a stand-in")


@pytest.mark.parametrize(
    ("payload", "format"),
    [
        pytest.param(
            payload,
            format,
            marks=() if format == "mp_rank" or payload in ALWAYS else pytest.mark.long,
            id=f"{payload}-{format}",
        )
        for payload in PAYLOADS
        for format in FORMATS
    ],
)
def test_nothing_of_a_hostile_file_is_run_and_what_it_asked_for_is_named(
    payload: str, format: str, tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    make, asked = PAYLOADS[payload]
    file, read = FORMATS[format](tmp_path / "hostile", make(mark))
    with pytest.raises(
        ValueError, match=f"refused, as it holds more than tensors: .*({asked}), of which nothing"
    ) as refusal:
        read()
    assert str(refusal.value).startswith(f"{file}: ") and "\n" not in str(refusal.value)
    assert not mark.exists()


@pytest.mark.parametrize("payload", ["exec", "system", "nested", "inside"])
def test_the_canary_sings_where_files_are_trusted(payload: str, tmp_path: Path) -> None:
    file, _ = rank_file(tmp_path / "hostile", PAYLOADS[payload][0](tmp_path / "executed"))
    torch.load(file, weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.eye(4).to_sparse(), "is no dense tensor of real numbers"),
        (torch.zeros(2, dtype=torch.complex64), "is no dense tensor of real numbers"),
        (torch.zeros(4, device="meta"), "is no dense tensor of real numbers"),
        (torch.zeros(1).expand(10**9), "claims to be larger than what is stored of it"),
    ],
)
def test_tensors_that_are_no_plain_ones_are_named(tensor: Any, message: str, format: str, tmp_path: Path) -> None:
    file, read = FORMATS[format](tmp_path / "odd", tensor)
    with pytest.raises(ValueError, match=message) as refusal:
        read()
    assert str(refusal.value).startswith(f"{file}: ") and "\n" not in str(refusal.value)


def test_a_file_gives_what_it_holds_and_classes_of_data_do_nothing(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    scaler = scalers.DynamicLossScaler(2.0, 2.0, 100, 1.0, 1, False, False)
    content = {
        "tensors": [torch.arange(6).view(2, 3).t(), torch.tensor(1.5, dtype=torch.bfloat16)], "text": "ä", 3: None,
        "shape": torch.Size([2, 3]), "place": fragment_address(numel=3, start=4), "stage": ZeroStageEnum.gradients,
        "scaler": scaler, "flag": True, "rate": 0.5,
    }  # fmt: skip
    torch.save(content, file)
    found = open_file(file)
    tensors = found.content.pop("tensors")
    assert tensors == [Stored(0, "int64", (3, 2)), Stored(1, "bfloat16", ())]
    assert found.content.pop("place").name == "deepspeed.utils.tensor_fragment.fragment_address"
    assert found.content.pop("scaler").name == "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"
    stage = Odd("deepspeed.runtime.zero.config.ZeroStageEnum", [2])
    assert found.content == {"text": "ä", 3: None, "shape": [2, 3], "stage": stage, "flag": True, "rate": 0.5}
    read = read_tensors(found, {"a": tensors[0], "b": tensors[1]})
    assert torch.equal(read["a"], content["tensors"][0]) and torch.equal(read["b"], content["tensors"][1])
    assert read["b"].dtype == torch.bfloat16


def test_what_is_read_is_not_in_memory_until_it_is_used(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"wanted": torch.ones(2**24), "beside": torch.zeros(2**25)}, file)
    before = resident()
    found = open_file(file)
    read = read_tensors(found, {"wanted": found.content["wanted"]})
    assert resident() - before < 2**24
    assert float(read["wanted"].sum()) == 2**24


def resident() -> int:
    """Bytes of this process's own memory, without files that are mapped."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    folder = sat_writer.write(tmp_path, sat_writer.drawn(sat_writer.shapes_of(sizes_of("5b")), torch.bfloat16))
    file = folder / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=True)
    for value in (torch.zeros(3), torch.zeros(3).to_sparse()):
        content["module"]["model.diffusion_model.\x1b[2J\n"] = value
        torch.save(content, file)
        with pytest.raises(ValueError, match=r"mp_rank_00_model_states.pt.*x1b\[2J") as refusal:
            load_dit(tmp_path)
        assert str(refusal.value).isprintable()


def test_containers_without_end_are_refused(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    doubled: list[Any] = []
    for _ in range(30):
        doubled = [doubled, doubled]
    for content in (loop, doubled):
        torch.save({"module": content}, tmp_path / "file.pt")
        with pytest.raises(ValueError, match="file.pt: refused, as it holds more than 200000 values or more than 40"):
            open_file(tmp_path / "file.pt")


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    torch.save({"module": {"x": torch.zeros(2**20)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "file.pt", "w") as packed:
        for record in plain.infolist():
            packed.writestr(record.filename, plain.read(record), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="file.pt: refused, as it is compressed, which files of torch never are"):
        open_file(tmp_path / "file.pt")


def test_a_file_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(b"\x80\x02]" + b"Na" * 10**7 + b".")
    with pytest.raises(ValueError, match="file.pt: the process that reads it took longer than it may"):
        open_file(tmp_path / "file.pt", Limits(seconds=1))


def test_a_file_that_takes_too_much_memory_is_given_up(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"module": {"x": torch.zeros(2**22)}}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"file.pt: ") as refusal:
        open_file(file, Limits(memory=2**20 - 2 * file.stat().st_size))
    assert "\n" not in str(refusal.value)
    assert open_file(file).content == {"module": {"x": Stored(0, "float32", (2**22,))}}


def test_a_reader_that_dies_is_one_error_and_the_next_file_has_a_new_one(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"x": 1}, file)
    assert open_file(file).content == {"x": 1}
    reader = pickles._reader(os.getpid()).process
    reader.kill()
    reader.wait()
    with pytest.raises(ValueError, match="file.pt: the process that reads it ended without an answer"):
        open_file(file)
    assert open_file(file).content == {"x": 1}


def test_a_file_that_changes_meanwhile_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"x": torch.zeros(3)}, file)
    found = open_file(file)
    torch.save({"x": torch.zeros(4)}, file)
    with pytest.raises(ValueError, match="file.pt: x has changed since the file was opened"):
        read_tensors(found, {"x": found.content["x"]})


def test_a_bare_pickle_and_an_absent_file_are_named(tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "file.pt"
    file.write_bytes(pickle.dumps(Call(exec, touch(mark)), protocol=2))
    with pytest.raises(ValueError, match=r"file.pt: refused, as it holds more than tensors: .*exec"):
        open_file(file)
    assert not mark.exists()
    with pytest.raises(ValueError, match="absent.pt: no such file"):
        open_file(tmp_path / "absent.pt")
