"""launch/convert.py reshape and check, on checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.saved_states import save, whole_states
from tests.engine.test_checkpoint import flip
from tests.launch.releases import command


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "ckpt", 7)
    return tmp_path / "ckpt" / "step-000007"


def test_a_checkpoint_is_reshaped_and_checked(checkpoint: Path, tmp_path: Path) -> None:
    code, stdout, _ = command("reshape", checkpoint, tmp_path / "out", "--ranks", "3")
    assert (code, stdout.strip()) == (0, str(tmp_path / "out" / "step-000007"))
    for kind, tensors in whole_states(checkpoint).items():
        other = whole_states(tmp_path / "out" / "step-000007")[kind]
        assert all(other[name].equal(tensor) for name, tensor in tensors.items())
    code, stdout, _ = command("check", tmp_path / "out" / "step-000007")
    assert code == 0
    assert "step 7, 21 clips; model: 4 tensors, 26 elements of ema, exp_avg, exp_avg_sq, weights; 12 files" in stdout
    assert stdout.endswith("whole\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("reshape", "CHECKPOINT", "OUT", "--ranks", "3", "--tp", "2"), "--tp 2 does not divide --ranks 3"),
        (("reshape", "CHECKPOINT", "CHECKPOINT/.."), "step-000007 is there already"),
        (("reshape", "OUT", "OUT"), "is no checkpoint; expected a folder step-N of a run's ckpt"),
        (("check", "CHECKPOINT/.."), "is no checkpoint"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = [each.replace("CHECKPOINT", str(checkpoint)).replace("OUT", str(tmp_path / "out")) for each in arguments]
    code, _, stderr = command(*given)
    assert code != 0
    assert message in stderr
    assert stderr.count("\n") == 1


def test_damage_is_named(checkpoint: Path) -> None:
    flip(checkpoint / "ema-00000.safetensors")
    code, _, stderr = command("check", checkpoint)
    assert code == 78
    assert "step-000007/ema-00000.safetensors is damaged: SHA-256" in stderr
