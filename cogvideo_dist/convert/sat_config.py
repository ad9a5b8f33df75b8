"""Configuration files of SAT (the training code that CogVideoX was released with) -> one of launch/train_dit.py.

Files are read as SAT's ``--base A.yaml B.yaml`` reads them: merged, later ones win key by key. Names of classes in them are
compared with a table and never imported. No key is lost: each ends up translated, dropped with a reason, or named as without
counterpart.
"""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cogvideo_dist.config.load import ConfigError, load_config, read_merged
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.convert.sat_config_keys import Keys, Line, Setting
from cogvideo_dist.convert.sat_config_model import folder_of, translate_model
from cogvideo_dist.convert.sat_config_rules import settle_by_rules
from cogvideo_dist.convert.sat_config_run import Situation, translate_run
from cogvideo_dist.convert.sat_config_text import account, configuration

SECTIONS = ("args", "model", "data", "deepspeed")


@dataclass(frozen=True)
class Translation:
    """``yaml``: the file's text; ``config``: what it loads as; ``table``: the account that ``lines`` and ``settings`` hold."""

    yaml: str
    config: DiTRun
    table: str
    lines: tuple[Line, ...]
    settings: tuple[Setting, ...]


def translate(files: Sequence[str | Path], situation: Situation | None = None) -> Translation:
    """The configuration that ``files`` describe.

    Raises ``ConfigError`` where a file cannot be read strictly, holds no model of a released kind, contradicts itself or asks
    for what launch/train_dit.py refuses.
    """
    situation = situation or Situation()
    merged, places = read_merged(files)
    names = ", ".join(map(str, files))
    if not any(section in merged for section in SECTIONS):
        raise ConfigError(f"{names}: no configuration of SAT, which has the sections {', '.join(SECTIONS)}")
    keys = Keys(merged, places)
    if not keys.under("model.network_config.params"):
        raise ConfigError(
            f"{names}: model.network_config is missing; give the model's file, too, as SAT's --base has it"
        )
    config = translate_model(keys)
    commands = translate_run(keys, config, situation=situation)
    settle_by_rules(keys)
    text = configuration(keys, _header(keys, files=files, commands=commands, situation=situation))
    return Translation(text, _loaded(text, keys), account(keys), tuple(keys.lines.values()), tuple(keys.settings))


def _header(keys: Keys, *, files: Sequence[str | Path], commands: Sequence[str], situation: Situation) -> list[str]:
    folder, out = folder_of(keys.ours["model.preset"]), shlex.quote(situation.out)
    given = " ".join(shlex.quote(str(file)) for file in files)
    where = f" --run-dir {shlex.quote(situation.run_dir)}" if situation.run_dir else ""
    return [
        f"deepspeed --num_gpus {situation.gpus} launch/train_dit.py --config {out}", "",
        f"Translated by: python launch/convert.py sat-config {given} --out {out} --gpus {situation.gpus}{where}",
        "Behind every key: the keys of SAT that it comes from, or why it is set.", "", "Before the first start:",
        f"  {folder}/ must hold that release in diffusers' format (transformer, vae, text_encoder, tokenizer)",
        *(f"  {command}" for command in commands), "",
    ]  # fmt: skip


def _loaded(text: str, keys: Keys) -> DiTRun:
    """What ``text`` loads as; a refusal names the key of SAT behind it, not the file that nobody has seen yet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "translated.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_config(DiTRun, [path])
        except ConfigError as error:
            message = re.sub(re.escape(str(path)) + r"(:\d+)?: ", "", str(error))
    place = message.split()[0].rstrip(":")
    for ours, origin in keys.origin.items():
        if ours == place or ours.endswith(f".{place}") or place.startswith(f"{ours}."):
            raise keys.error(origin[0], f"cannot be translated: {message}")
    raise ConfigError(f"the translation is refused: {message}")
