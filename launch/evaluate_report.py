"""What launch/evaluate.py shows of an autoencoder: a table, evaluation.json and evaluation.html, a page without a network."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo_dist.config.schema import Size
from cogvideo_dist.data.shards import shown as printable
from cogvideo_dist.evaluation.media import replacing, to_uint8, write_contact_sheet, write_mp4, write_png
from cogvideo_dist.evaluation.reconstruction import Sums, add, averages, latent_statistics
from cogvideo_dist.models.perceptual import RANDOM
from cogvideo_dist.protocols import Defect
from launch.figures import STYLE, Bar, bars_against, html_table

EXTREMES = 2
"""Clips at either end of the order by error that are shown."""
BARS = 24
"""Clips in a figure, those of the largest error."""
GAIN = 4
"""Errors are shown that much larger, black where there is none."""
COLUMNS = ("psnr", "ssim", "lpips", "flicker/reconstruction", "flicker/original")
SHEET = "contact-sheet.png"


@dataclass(frozen=True)
class Measured:
    """One clip and its sums."""

    key: str
    source: str
    caption: str
    size: Size
    sums: Sums

    @cached_property
    def averages(self) -> dict[str, float]:
        return averages(self.sums)


@dataclass(frozen=True)
class Shown:
    """A clip to look at: frames uint8 [T, H, W, 3]."""

    clip: Measured
    original: Tensor
    reconstruction: Tensor
    error: Tensor


@dataclass(frozen=True)
class Evaluation:
    """``about``: what was used; ``shown`` runs from the worst clip to the best."""

    about: Mapping[str, Any]
    clips: tuple[Measured, ...]
    shown: tuple[Shown, ...]
    unused: tuple[Defect, ...]

    @cached_property
    def total(self) -> Sums:
        return add(clip.sums for clip in self.clips)

    @property
    def warning(self) -> str:
        lpips = self.about["lpips"]
        if lpips is not None and lpips["backbone"] == RANDOM:
            return "LPIPS is that of an untrained network (--lpips random); it compares with no other LPIPS"
        return ""


def show(clip: Measured, original: Tensor, *, reconstruction: Tensor) -> Shown:
    """``original`` and ``reconstruction`` [3, T, H, W] in [-1, 1]."""
    error = GAIN * (reconstruction.clamp(-1, 1) - original).abs() - 1
    return Shown(clip, *map(to_uint8, (original, reconstruction, error)))


def keep_extremes(shown: Sequence[Shown]) -> list[Shown]:
    """Of clips, those with the largest and those with the smallest error, the largest first."""
    order = sorted(shown, key=lambda each: -each.clip.averages["mse"])
    return order if len(order) <= 2 * EXTREMES else [*order[:EXTREMES], *order[-EXTREMES:]]


def table(found: Evaluation) -> str:
    """For a terminal: the clips at either end and the whole."""
    rows = [
        ("clip", "size", *names(found)),
        *((each.clip.key, times(each.clip.size), *cells(found, each.clip.averages)) for each in found.shown),
        (f"all {len(found.clips)}", "", *cells(found, averages(found.total))),
    ]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    warning = [f"warning: {found.warning}"] if found.warning else []
    return "\n".join([*warning, *lines, latents(found)])


def names(found: Evaluation) -> list[str]:
    """Headings of the measures that were taken."""
    labels = {
        "psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS, untrained network" if found.warning else "LPIPS",
        "flicker/reconstruction": "flicker", "flicker/original": "flicker of original",
    }  # fmt: skip
    return [labels[name] for name in taken(found)]


def taken(found: Evaluation) -> list[str]:
    return [name for name in COLUMNS if name in averages(found.total)]


def cells(found: Evaluation, values: Mapping[str, float]) -> list[str]:
    digits = {"psnr": 2, "ssim": 4, "lpips": 4}
    return [f"{values[name]:.{digits.get(name, 2)}f}" if name in values else "-" for name in taken(found)]


def times(size: Size) -> str:
    return " x ".join(map(str, size))


def latents(found: Evaluation) -> str:
    """One line on the latents."""
    facts = latent_statistics(found.total)
    return (
        f"latents: mean {facts.mean:.4f}, std {facts.std:.4f}, so scaling_factor {facts.scaling_factor:.4f} "
        f"(now {found.about['vae']['scaling_factor']:g}); {100 * facts.clamped:.2g} % of log-variances clamped"
    )


def write_report(out: Path, found: Evaluation) -> None:
    """evaluation.json, evaluation.html, the contact sheet and the worst and best clips, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    write_contact_sheet(out / SHEET, sheet_rows(found))
    films = {}
    for name, each in (("worst", found.shown[0]), ("best", found.shown[-1])):
        frames = torch.cat([each.original, each.reconstruction, each.error], dim=2)  # side by side
        films[name] = f"{name}.png" if len(frames) == 1 else f"{name}.mp4"
        if len(frames) == 1:
            write_png(out / films[name], frames[0])
        else:
            write_mp4(out / films[name], frames, found.about["fps"])
    sheet = base64.b64encode((out / SHEET).read_bytes()).decode()
    for name, text in (
        ("evaluation.json", json.dumps(json_safe(as_data(found)), indent=1, allow_nan=False) + "\n"),
        ("evaluation.html", page(found, films, sheet=sheet)),
    ):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def sheet_rows(found: Evaluation) -> list[tuple[str, Tensor]]:
    """Three rows a clip, so that a column is one moment."""
    rows = []
    for each in found.shown:
        figures = ", ".join(f"{name} {value}" for name, value in zip(names(found), cells(found, each.clip.averages)))
        rows += [
            (f"{each.clip.key} original: {each.clip.caption}", each.original),
            (f"{each.clip.key} reconstruction: {figures}", each.reconstruction),
            (f"{each.clip.key} error x {GAIN}", each.error),
        ]
    return rows


def as_data(found: Evaluation) -> dict[str, Any]:
    """Everything the page shows, as plain values."""
    return {
        "warning": found.warning,
        "used": dict(found.about),
        "total": {"clips": len(found.clips), **averages(found.total)},
        "latents": asdict(latent_statistics(found.total)),
        "clips": [
            {"key": clip.key, "source": clip.source, "caption": clip.caption, "size": clip.size, **clip.averages}
            for clip in found.clips
        ],
        "unused": [asdict(defect) for defect in found.unused],
    }


def json_safe(value: Any) -> Any:
    """The same with infinities as the words "inf" and "-inf", for which JSON has no number."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return str(value) if isinstance(value, float) and math.isinf(value) else value


def page(found: Evaluation, films: Mapping[str, str], *, sheet: str) -> str:
    about = found.about
    sizes = ", ".join(map(times, about["sizes"]))
    lead = (
        f"{about['vae']['folder']}; {len(found.clips)} clips ({about['clips']}) of {about['shards']} at {sizes}, "
        f"{about['fps']:g} frames/s; {about['semantics']} semantics; {about['device']}, torch {about['torch']}."
    )
    warning = f'<p class="warning">{escape(found.warning)}</p>' if found.warning else ""
    total = ("all", "", *cells(found, averages(found.total)))
    rows = [(printable(clip.source), times(clip.size), *cells(found, clip.averages)) for clip in found.clips]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evaluation of an autoencoder</title><style>{STYLE}img,video{{max-width:100%;border-radius:8px;margin-top:8px}}</style>
</head><body><main>
<header><h1>Evaluation of an autoencoder</h1><p class="quiet">{escape(lead)}</p>{warning}</header>
<section><h2>All clips</h2>{html_table(("", "size", *names(found)), [total])}
<p class="quiet">PSNR and SSIM: the mean over frames of pixels in [0, 1]. Flicker: the mean absolute difference of neighbouring
frames in 8-bit levels; a reconstruction should have the original's.</p></section>
{_quality(found)}{_flicker(found)}{_latents(found)}
<section><h2>Worst and best</h2><p class="quiet">original, reconstruction, error x {GAIN}</p>
{"".join(_film(name, file) for name, file in films.items())}
<img alt="frames of the worst and the best clips" src="data:image/png;base64,{sheet}"></section>
<section><h2>Every clip</h2><div class="wide">{html_table(("clip", "size", *names(found)), rows)}</div></section>
{_unused(found)}
<section><h2>What was used</h2><details><summary>with digests</summary>
<pre>{escape(json.dumps(json_safe(dict(about)), indent=1))}</pre></details></section>
</main></body></html>
"""


def _largest_errors(found: Evaluation) -> list[Measured]:
    return sorted(found.clips, key=lambda clip: -clip.averages["mse"])[:BARS]


def _quality(found: Evaluation) -> str:
    mean = averages(found.total)["psnr"]
    clips = [(clip, clip.averages["psnr"]) for clip in _largest_errors(found)]
    bars = [
        Bar(clip.key, value, f"{value:.2f}", expected=mean if mean < math.inf else None)
        for clip, value in clips
        if value < math.inf
    ]
    return _figure(
        "PSNR by clip", bars, unit="dB", note=f"tick: the mean, {mean:.2f} dB; the {BARS} largest errors at most"
    )


def _flicker(found: Evaluation) -> str:
    clips = [(clip.key, clip.averages) for clip in _largest_errors(found) if "flicker/original" in clip.averages]
    bars = [
        Bar(
            key,
            values["flicker/reconstruction"],
            f"{values['flicker/reconstruction']:.2f}",
            expected=values["flicker/original"],
        )
        for key, values in clips
    ]
    return _figure("Flicker by clip", bars, unit="", note="tick: the original's")


def _latents(found: Evaluation) -> str:
    stds = latent_statistics(found.total).channel_std
    scale = 1 / found.about["vae"]["scaling_factor"]
    bars = [Bar(f"channel {i}", value, f"{value:.3f}", expected=scale) for i, value in enumerate(stds)]
    note = f"{latents(found)}; tick: 1 / scaling_factor"
    return _figure("Standard deviation of the latents", bars, unit="", note=note)


def _figure(title: str, bars: Sequence[Bar], *, unit: str, note: str) -> str:
    if not bars:
        return ""
    drawn = bars_against(bars, unit=unit, title=title)
    return f'<section><h2>{escape(title)}</h2><p class="quiet">{escape(note)}</p>{drawn}</section>'


def _film(name: str, file: str) -> str:
    if file.endswith(".png"):
        return f'<p>{name}</p><img alt="{name}" src="{file}">'
    return f'<p>{name}</p><video controls loop muted src="{file}"></video>'


def _unused(found: Evaluation) -> str:
    items = "".join(f"<li>{escape(printable(defect.source))}: {escape(defect.reason)}</li>" for defect in found.unused)
    return f"<section><h2>Not used</h2><ul>{items}</ul></section>" if items else ""
