"""How long a rank may take before its run counts as hanging."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Watch:
    """Seconds that a rank may take for one thing; if it takes longer, the run counts as hanging and ends. 0: any time.

    ``init_s``: until all ranks have met. ``build_s``: models and data; ``load_s``: a checkpoint. ``step_s``: a forward, a
    backward or an update of one pack, ``first_step_s``: the same in the first step after a start, in which kernels are
    compiled. ``data_s``: for a batch. ``save_s``: until the run goes on after a checkpoint; ``judge_s``: a held-out batch, or
    the pictures; ``end_s``: what is left to do after the last step, such as uploads.
    """

    init_s: float = 300.0
    build_s: float = 3600.0
    load_s: float = 3600.0
    first_step_s: float = 3600.0
    step_s: float = 600.0
    data_s: float = 900.0
    save_s: float = 3600.0
    judge_s: float = 3600.0
    end_s: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"watch.{name} must be at least 0, found {value}")
