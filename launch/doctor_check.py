"""What a check of launch/doctor.py says, and how one is kept from hanging, raising, or ending the others."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

Status = Literal["pass", "warn", "fail", "skipped"]
SEVERITY: tuple[Status, ...] = ("skipped", "pass", "warn", "fail")

Result = TypeVar("Result")

THREAD = "doctor: "
"""How the names of threads that run checks begin."""

OWN = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Finding:
    """One row: what was ``found``, what is ``expected`` and the ``remedy``, a line each.

    ``figures``: numbers by name; of those that end in ``_per_s`` the ranks should have like ones. ``details``: lines below.
    """

    check: str
    status: Status
    found: str
    expected: str = ""
    remedy: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    details: tuple[str, ...] = ()

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Finding:
        """From what JSON has made of it."""
        return cls(**{**plain, "details": tuple(plain["details"])})


Check = Callable[[], Sequence[Finding]]


class Hung(OSError):
    """No answer within the limit; the message says where it is stuck."""


def within(limit_s: float, work: Callable[[], Result], *, device: torch.device | None = None) -> Result:
    """What ``work`` returns or raises; ``Hung`` if it does neither in ``limit_s``, in which case it is left to itself in a
    thread that does not keep the process alive."""
    done: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)  # a thread begins with the first one
            done.append((True, work()))
        except BaseException as error:  # whatever it is, the caller's thread raises it
            done.append((False, error))

    thread = threading.Thread(target=run, name=f"{THREAD}{getattr(work, '__name__', 'work')}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not done:
        raise Hung(f"no answer in {limit_s:g} s{_place(thread)}")
    good, value = done[0]
    if good:
        return value
    raise value


def examined(name: str, check: Check, *, limit_s: float, device: torch.device | None = None) -> list[Finding]:
    """What a check finds. That it raises or hangs is a finding, too."""
    try:
        return list(within(limit_s, check, device=device))
    except Hung as error:
        return [Finding(name, "fail", str(error), "an answer", "see what hangs there; it is not waited for any longer")]
    except ValueError as error:  # the user's, in words that say what to do
        return [Finding(name, "fail", told(error), "no error", "do what it says, and check again")]
    except Exception as error:
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        return [
            Finding(name, "fail", f"{kind}{told(error)}", "no error", f"see what was asked for at {raised_at(error)}")
        ]


def told(error: BaseException) -> str:
    """An error in one line, of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:300]} ..."


def raised_at(error: BaseException) -> str:
    """The innermost line of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_ours(frame.filename)] or list(frames)
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else "an unknown place"


def _is_ours(file: str) -> bool:
    path = Path(file)
    return OWN in path.parents and "site-packages" not in path.parts


def _place(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    frames = traceback.extract_stack(frame) if frame else []
    own = [each for each in frames if _is_ours(each.filename) and each.name != "run"]
    if not own:
        return ""
    return f", it is at {Path(own[-1].filename).name}:{own[-1].lineno} ({(own[-1].line or own[-1].name).strip()})"


def anything_hangs() -> bool:
    """Whether a check was left to itself and is still at it."""
    return any(thread.name.startswith(THREAD) for thread in threading.enumerate())


def judged(value: float, *, warn: float, fail: float) -> Status:
    """Of a figure that should be high."""
    return "fail" if value < fail else "warn" if value < warn else "pass"


def amount(value: float) -> str:
    """Bytes, such as 1.5 GB."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {unit}" if abs(value) < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} bytes"


def rate(value: float) -> str:
    return f"{amount(value)}/s"


def listed(items: Sequence[object], most: int = 4) -> str:
    """The first few."""
    rest = len(items) - most
    return ", ".join(map(str, items[:most])) + (f" and {rest} more" if rest > 0 else "")


def ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def ranks_of(numbers: Sequence[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 5``."""
    return f"rank{'s' * (len(numbers) != 1)} {ranges(numbers)}"
