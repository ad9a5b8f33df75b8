"""The part of one packed sequence that this rank owns, and the only door to the rest of it."""

from __future__ import annotations

import torch
from torch import Tensor

from cogvideo_dist.pack.layout import TEXT, VISION, PackLayout


class SequenceShard:
    """The whole sequence of ``layout``: every token is here.

    ``runs`` are this rank's tokens by modulation row (2 * clip + kind), ``vision_runs`` the same for a tensor that holds vision
    tokens alone (row = clip), ``groups`` the segments in which tokens attend to each other.
    """

    def __init__(self, layout: PackLayout) -> None:
        self.layout = layout
        self.runs = layout.runs()
        self.vision_runs = layout.runs_of(VISION)
        self.groups = layout.groups()

    def interleave(self, text: Tensor, vision: Tensor) -> Tensor:
        """Text tokens [n_text, d] and vision tokens [n_vision, d], clip after clip each -> the sequence [n, d]."""
        texts = text.split([clip.text for clip in self.layout.clips])
        visions = vision.split([clip.vision for clip in self.layout.clips])
        return torch.cat([part for pair in zip(texts, visions) for part in pair])

    def only(self, tokens: Tensor, kind: int) -> Tensor:
        """The tokens of one kind of the sequence [n, d], in order; a view if they are one piece."""
        pieces = [tokens[run.start : run.stop] for run in self.runs if run.row % 2 == kind]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


__all__ = ["TEXT", "VISION", "SequenceShard"]
