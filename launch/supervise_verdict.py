"""Who was it? From what supervisors report of their ranks, to the one that is to be named."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

Standing = Mapping[str, Any]
"""Of a rank: ``phase``, ``step``, ``age`` in it, ``state`` of its process, ``collectives`` and ``stack`` if it answered."""


class Failed(Protocol):
    rank: int
    kind: str
    text: str
    code: int


AnyFailed = TypeVar("AnyFailed", bound=Failed)

TORCH = ("distributed_c10d.py", "c10d_logger.py", "rendezvous.py")
"""Files whose functions wait for other ranks."""

GONE = "another rank is gone"
"""In what a rank says that ends because of another one."""


def first_cause(failures: Sequence[AnyFailed]) -> AnyFailed:
    """The failure that the others followed from: deaths and errors of a rank itself come before what a rank says or does when
    another one is gone, and among equals the first that was heard of."""

    def rank_of(failure: AnyFailed) -> int:
        if failure.kind == "died":
            return 3 if signal.SIGABRT.name in failure.text else 0
        if failure.kind == "ended":
            return 4 if GONE in failure.text else 1
        return 2 if failure.kind == "lost" else 5

    return min(failures, key=rank_of)


def verdict(standing: Mapping[int, Standing], *, world: int, found: str) -> tuple[int, str]:
    """The rank for which the others wait, and what is to be said of it; ``found``: what the first watch said that was out."""
    absent = sorted(set(range(world)) - set(standing))
    if absent:
        others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        return absent[0], f"has not been heard of{others}: was it started, and does it see the run's folder? ({found})"
    for rank, each in sorted(standing.items()):
        if each["state"] in "Tt":
            return rank, f"is stopped (by SIGSTOP or a debugger) {_where(each)}{_waiting(standing, rank)}"
    silent = [rank for rank, each in sorted(standing.items()) if each.get("stack") is None]
    if silent and len(silent) < len(standing):
        rank = silent[0]
        return (
            rank,
            f"does not answer, held in a call that lets no thread run, {_where(standing[rank])}{_waiting(standing, rank)}",
        )
    return _by_collectives(standing) or _by_age(standing)


def _by_collectives(standing: Mapping[int, Standing]) -> tuple[int, str] | None:
    """The rank that has begun fewer collectives of a group than another, and more of none; or ranks that disagree on one."""
    behind, ahead = _order(standing)
    culprits = sorted(behind - ahead)
    if culprits:
        rank = culprits[0]
        return rank, f"hangs {_where(standing[rank])}{_waiting(standing, rank)}{_at(standing[rank])}"
    return _disagreement(standing)


def _order(standing: Mapping[int, Standing]) -> tuple[set[int], set[int]]:
    """Who is behind another rank in a group that both are in, and who is ahead of one."""
    behind, ahead = set(), set()
    for begun in _begun(standing).values():
        most, least = max(begun.values()), min(begun.values())
        behind |= {rank for rank, count in begun.items() if count < most}
        ahead |= {rank for rank, count in begun.items() if count > least}
    return behind, ahead


def _begun(standing: Mapping[int, Standing]) -> dict[str, dict[int, int]]:
    """Group -> rank -> collectives that it has begun."""
    found: dict[str, dict[int, int]] = {}
    for rank, each in standing.items():
        for name, group in (each.get("collectives") or {}).items():
            found.setdefault(name, {})[rank] = group["begun"]
    return found


def _disagreement(standing: Mapping[int, Standing]) -> tuple[int, str] | None:
    """Two ranks whose same collective is not the same."""
    for name, begun in _begun(standing).items():
        calls = {rank: standing[rank]["collectives"][name]["calls"].get(f"c{begun[rank]}") for rank in sorted(begun)}
        waits = {rank: call for rank, call in calls.items() if call and not call["done"]}
        for rank, call in waits.items():
            first = next(iter(waits))
            if _call(call) != _call(waits[first]) and begun[rank] == begun[first]:
                label = standing[rank]["collectives"][name]["label"]
                return rank, (
                    f"and rank {first} disagree on collective {begun[rank]} of group {label}: rank {first} is in "
                    f"{_call(waits[first])}, rank {rank} in {_call(call)}, {_where(standing[rank])}{_at(standing[rank])}"
                )
    return None


def _by_age(standing: Mapping[int, Standing]) -> tuple[int, str]:
    """Nothing tells them apart but what they are at, of which waiting for others is the least telling, and for how long."""
    phases = [(each["phase"], each["step"]) for each in standing.values()]

    def blame(rank: int) -> tuple[bool, int, float]:
        each = standing[rank]
        return not _waits(each), -phases.count((each["phase"], each["step"])), each["age"]

    rank = max(standing, key=blame)
    return rank, f"hangs {_where(standing[rank])}{_waiting(standing, rank)}{_at(standing[rank])}"


def _waits(each: Standing) -> bool:
    """Whether it is in torch's own code that waits for others."""
    return bool(each.get("stack")) and each["stack"][0].startswith(TORCH)


def _where(each: Standing) -> str:
    step = f" of step {each['step']}" if each["step"] else ""
    return f"in {each['phase']}{step} for {each['age']:.0f} s"


def _waiting(standing: Mapping[int, Standing], rank: int) -> str:
    """The collective in which others wait for it."""
    own = standing[rank].get("collectives") or {}
    for other, each in sorted(standing.items()):
        for name, group in (each.get("collectives") or {}).items():
            begun = own.get(name, {"begun": -1})["begun"]
            for key, call in group["calls"].items():
                if (
                    other != rank
                    and not call["done"]
                    and key[0] == "c"
                    and int(key[1:]) > begun
                    and (own == {} or name in own)
                ):
                    return f" while rank {other} waits in {_call(call)} of group {group['label']} (number {key[1:]})"
    waits = next(
        (found for other, each in sorted(standing.items()) if other != rank and (found := _operation(each))), ""
    )
    return f" while others wait in {waits}" if waits else ""


def _operation(each: Standing) -> str:
    """The collective on its stack, where torch does not record it."""
    for entry in each.get("stack") or ():
        file, _, function = entry.partition(" ")
        if file.startswith("distributed_c10d.py"):
            return function
    return ""


def _call(call: Mapping[str, Any]) -> str:
    kinds, sizes = call["dtypes"], call["sizes"]
    return f"{call['op']} of {kinds[0] if kinds else 'nothing'} {sizes[0] if sizes else ''}".rstrip()


def _at(each: Standing) -> str:
    """The innermost line of its own code that it is at."""
    ours = [
        entry for entry in each.get("stack") or () if not entry.startswith(("distributed_c10d.py", "c10d_logger.py"))
    ]
    return f"; it is at {ours[0]}" if ours else ""
