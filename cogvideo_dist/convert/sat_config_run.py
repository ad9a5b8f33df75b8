"""SAT's sections ``args``, ``deepspeed`` and ``data``: the optimizer's run, what is read, how it is packed, where it goes."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from cogvideo_dist.convert.sat_config_keys import Keys, shown
from cogvideo_dist.convert.sat_config_model import folder_of
from cogvideo_dist.convert.sat_config_rules import NETWORK, STAGE1, UNKNOWN_CLASS
from cogvideo_dist.models.presets import DiTConfig

DATA_CLASSES = ("data_video.SFTDataset", "data_video.VideoDataset")
EMA_CLASSES = ("sat.ops.FusedEmaAdam", "sat.ops.fused_ema_adam.FusedEmaAdam")
ADAM_CLASSES = ("Adam", "AdamW", "FusedAdam", "adam", "adamw", "fusedadam")

ZERO = "deepspeed.zero_optimization"
OPTIMIZER = "deepspeed.optimizer"
DEFAULT = "SAT's own default"

AUTO_WARMUP = 100
"""Steps that SAT holds at 5 % of the rate at most, whenever it does not pre-train from nothing."""


@dataclass(frozen=True)
class Situation:
    """What SAT's files do not say: the GPUs that it ran on, which make its batch; the run's folder; the new file's name."""

    gpus: int = 8
    run_dir: str | None = None
    out: str = "translated.yaml"


def translate_run(keys: Keys, config: DiTConfig, *, situation: Situation) -> list[str]:
    """Everything but the model; returns the commands that make the shards."""
    commands = _shards(keys, situation.out, latents=_latents(keys, config))
    _sizes(keys, config)
    _parallel(keys)
    _batch(keys, config, gpus=situation.gpus)
    _optimizer(keys)
    _precision_and_memory(keys)
    _steps(keys)
    _warmup(keys)
    _folders(keys, situation)
    _evaluation(keys)
    _sampling(keys, config)
    return commands


def _latents(keys: Keys, config: DiTConfig) -> bool:
    path = "model.latent_input"
    wanted = keys.flag(path)
    if wanted and config.image_channels:
        keys.lack(path, "an image condition is the first frame with fresh noise, so clips are read as pixels")
        keys.assume("data.source", "pixels", text="the only source of an image-to-video model")
        return False
    keys.settle(
        path, "data.source", value="latents" if wanted else "pixels", otherwise=DEFAULT,
        text="SAT's own files of latents cannot be read; launch/encode.py makes the shards" if wanted else "",
    )  # fmt: skip
    return wanted


def _shards(keys: Keys, out: str, *, latents: bool) -> list[str]:
    """``data.shards`` or ``data.sources``; a folder with ``labels/`` and ``videos/`` is packed by make_shards.py."""
    path, weights = "args.train_data", "args.train_data_weights"
    tars = keys.leaves.get("data.target") == DATA_CLASSES[1]
    if keys.has("data.target"):
        _data_class(keys)
    folders = [str(folder) for folder in keys.items(path)]
    if not folders and keys.has(path):
        keys.drop(path, "it names nothing")
    names: list[str] = []
    for folder in folders or ["FOLDER"]:
        name = f"shards/{PurePosixPath(folder).name or 'train'}" if folders else "shards/train"
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    tool = "index_shards.py {0} --out {1}" if tars else "make_shards.py {0} {1}"
    commands = [
        "python data_tools/" + tool.format(shlex.quote(folder), shlex.quote(name))
        for folder, name in zip(folders or ["FOLDER"], names)
    ]
    if latents:
        several = "'data.sources=[]' " if len(names) > 1 else ""
        commands += [
            f"python launch/encode.py --config {shlex.quote(out)} data.source=pixels {several}"
            f"{shlex.quote(f'data.shards={name}')} --out {shlex.quote(f'{name}-latents')}"
            for name in names
        ]
        names = [f"{name}-latents" for name in names]
    if not folders:
        keys.assume("data.shards", names[0], text=commands[0], fill_in=True)
    elif len(names) == 1:
        keys.give(path, "data.shards", value=names[0], text="" if tars else "labels/ and videos/ are taken as they are")
    else:
        _mix(keys, names)
    if len(names) == 1 and keys.has(weights):
        keys.drop(weights, "there is one set")
    return commands


def _mix(keys: Keys, names: list[str]) -> None:
    weights = "args.train_data_weights"
    numbers = keys.numbers(weights, count=len(names)) if keys.has(weights) else [1.0] * len(names)
    sources = [{"shards": name, "weight": weight} for name, weight in zip(names, numbers)]
    keys.give("args.train_data", "data.sources", value=sources)
    if keys.has(weights):
        keys.give(weights, "data.sources", value=sources)


def _data_class(keys: Keys) -> None:
    target = keys.leaves["data.target"]
    if target == DATA_CLASSES[0]:
        keys.give(
            "data.target", "data.crop", value="center",
            text="as SAT cuts: from the beginning, the middle of the picture. random uses all of every clip",
        )  # fmt: skip
    elif target == DATA_CLASSES[1]:
        keys.give("data.target", "data.crop", value="random", text="anywhere in the clip, as SAT cuts in time")
    else:
        keys.lack("data.target", UNKNOWN_CLASS)


def _sizes(keys: Keys, config: DiTConfig) -> None:
    """One size of all clips, as SAT has it."""
    new = config.patch[0] > 1
    base = (81, 768, 1360) if new else (49, 480, 720)
    frames = next((p for p in ("data.params.max_num_frames", "data.params.num_frames") if keys.has(p)), None)
    picture = next((p for p in ("data.params.video_size", "data.params.image_size") if keys.has(p)), None)
    height, width = (int(number) for number in keys.numbers(picture, count=2)) if picture else base[1:]
    size = [keys.whole(frames) if frames else base[0], height, width]
    text = "a clip too short for it is not used; list shorter sizes beside it"
    for path in (frames, picture):
        if path:
            keys.give(path, "data.sizes", value=[size], text=text)
    if not (frames or picture):
        keys.assume("data.sizes", [size], text="the size that the model was released for", fill_in=True)
    own = [config.sample_height * 8, config.sample_width * 8]
    if picture and config.positions == "rope" and not config.learned_positions and not new and own != [height, width]:
        keys.assume("model.rope_grid", "extrapolate", text=f"SAT counts positions, also at {height}x{width}")
    path = "data.params.fps"
    fps = keys.number(path) if keys.has(path) else (16.0 if new else 8.0)
    if keys.has(path):
        text = "frames are chosen by time; SAT's whole stride reads 30 frames per second at 10, not at 8"
        keys.give(path, "data.fps", value=fps, text=text)
    else:
        keys.assume("data.fps", fps, text="the rate that the model was released for", fill_in=True)
    if keys.has(path := "data.params.skip_frms_num"):
        keys.lack(
            path, f"no frames are skipped; where the first {keys.number(path):g} show another scene, cut the files"
        )


def _parallel(keys: Keys) -> None:
    outer, inner = "args.model_parallel_size", f"{NETWORK}.transformer_args.model_parallel_size"
    tp = keys.whole(outer if keys.has(outer) else inner, 1)
    if tp < 1:
        raise keys.error(outer if keys.has(outer) else inner, f"expected a number of ranks from 1 on, found {tp}")
    for path in (outer, inner):
        if keys.has(path):
            text = "" if tp == 1 else "parallel.sp splits tokens, for long clips"
            keys.give(path, "parallel.tp", value=keys.whole(path), text=text)
    path = f"{STAGE1}.cp_size"
    cp = keys.whole(path, 1)
    if keys.has(path) and cp > 1 and tp % cp == 0:
        keys.give(path, "parallel.cp", value=cp, text="exact, also backwards")
    elif keys.has(path) and cp > 1:
        keys.lack(path, f"parallel.cp splits frames over the ranks of one sample, of which there are {tp}")
    elif keys.has(path):
        keys.drop(path, "frames are not split over ranks; parallel.cp does")


def _batch(keys: Keys, config: DiTConfig, *, gpus: int) -> None:
    """SAT's batch in packs: one pack is one micro-step of one data-parallel rank."""
    tp = keys.ours.get("parallel.tp", 1)
    if gpus < 1 or gpus % tp:
        raise keys.error("args.model_parallel_size", f"--gpus {gpus} does not divide by {tp}")
    micro_path = "deepspeed.train_micro_batch_size_per_gpu" if keys.under("deepspeed") else "args.batch_size"
    steps_path = ("deepspeed" if keys.under("deepspeed") else "args") + ".gradient_accumulation_steps"
    micro = keys.whole(micro_path, 1)
    steps = keys.whole(steps_path, 1)
    if micro < 1 or steps < 1:
        raise keys.error(micro_path if micro < 1 else steps_path, "expected a whole number from 1 on")
    frames, height, width = keys.ours["data.sizes"][0]
    o, p, q = config.patch
    tokens = config.text_length + math.ceil(((frames - 1) // 4 + 1) / o) * (height // 8 // p) * (width // 8 // q)
    keys.settle(
        micro_path, "data.tokens_per_pack", value=micro * tokens, otherwise=f"one clip of {tokens} tokens",
        text=f"{micro} clips of {tokens} tokens, of text and video",
    )  # fmt: skip
    keys.settle(
        steps_path, "data.packs_per_step", value=steps * gpus // tp, otherwise=f"one on each of {gpus // tp} ranks",
        text=f"{steps} x {gpus // tp} data-parallel ranks (--gpus {gpus}): the batch, whatever it then runs on",
    )  # fmt: skip


def _optimizer(keys: Keys) -> None:
    target, params = keys.leaves.get(f"{OPTIMIZER}.type"), f"{OPTIMIZER}.params"
    decay = None
    if isinstance(target, str) and target in EMA_CLASSES:
        decay = keys.number(f"{params}.ema_decay", 0.9999)
        text = "AdamW; the average is saved and goes on after a restart"
        keys.give(f"{OPTIMIZER}.type", "train.ema_decay", value=decay, text=text)
        if keys.has(f"{params}.ema_decay"):
            keys.give(f"{params}.ema_decay", "train.ema_decay", value=decay)
    elif isinstance(target, str) and target in ADAM_CLASSES:
        keys.give(f"{OPTIMIZER}.type", "train.ema_decay", value=None, text="AdamW without an average of the weights")
    else:
        keys.assume("train.ema_decay", None, text="no optimizer of SAT that averages the weights is named")
    rate = f"{params}.lr" if keys.has(f"{params}.lr") else "args.lr"
    if keys.has(rate):
        text = "SAT's comment: 5e-4 to 1e-3 for adapters, 1e-5 for all weights" if "lora.rank" in keys.ours else ""
        keys.give(rate, "train.learning_rate", value=keys.number(rate), text=text)
    else:
        keys.assume("train.learning_rate", 1.0e-4, text=DEFAULT, fill_in=True)
    if keys.has("args.lr") and rate != "args.lr":
        keys.drop("args.lr", "the deepspeed section overrides it, in SAT too")
    decay_path = f"{params}.weight_decay" if keys.has(f"{params}.weight_decay") else "args.weight_decay"
    keys.settle(decay_path, "train.weight_decay", value=keys.number(decay_path), otherwise=DEFAULT)
    if keys.has("args.weight_decay") and decay_path != "args.weight_decay":
        keys.drop("args.weight_decay", "the deepspeed section overrides it, in SAT too")
    betas = keys.numbers(f"{params}.betas", count=2) if keys.has(f"{params}.betas") else [0.9, 0.999]
    keys.settle(f"{params}.betas", "train.betas", value=betas, otherwise=DEFAULT)
    keys.settle(f"{params}.eps", "train.eps", value=keys.number(f"{params}.eps", 1e-8), otherwise=DEFAULT)
    path = "deepspeed.gradient_clipping"
    keys.settle(
        path, "train.clip_norm", value=keys.number(path) or None, otherwise="DeepSpeed's own default: no clipping",
        text="of the global norm; the paper has 1.0",
    )  # fmt: skip


def _precision_and_memory(keys: Keys) -> None:
    found = []
    for name in ("fp16", "bf16"):
        for path in (f"deepspeed.{name}.enabled", f"args.{name}"):
            if keys.has(path) and (path.startswith("deepspeed") or not keys.under("deepspeed")) and keys.flag(path):
                found.append((name, path))
    if len({name for name, _ in found}) > 1:
        raise keys.error(found[-1][1], f"{found[0][1]} is true, too; choose one precision")
    precision = found[0][0] if found else "fp32"
    for name in ("fp16", "bf16"):
        for path in (f"deepspeed.{name}.enabled", f"args.{name}"):
            if not keys.has(path):
                continue
            if path.startswith("args") and keys.under("deepspeed"):
                keys.drop(path, "the deepspeed section overrides it, in SAT too")
            else:
                keys.give(path, "train.precision", value=precision)
    if "train.precision" not in keys.ours:
        keys.assume("train.precision", precision, text="neither fp16 nor bf16 is on")
    path = f"{ZERO}.stage" if keys.under("deepspeed") else "args.zero_stage"
    stage = keys.whole(path)
    keys.settle(path, "train.zero_stage", value=stage, otherwise="DeepSpeed's own default")
    for path, ours, lowest in (
        (f"{ZERO}.cpu_offload", "optimizer", 1), (f"{ZERO}.offload_optimizer.device", "optimizer", 1),
        (f"{ZERO}.offload_param.device", "parameters", 3),
    ):  # fmt: skip
        if not keys.has(path) or keys.leaves[path] in (False, None, "none"):
            continue
        if keys.leaves[path] in (True, "cpu") and stage >= lowest:
            keys.give(path, f"train.offload.{ours}", value=True)
        else:
            keys.lack(path, f"train.offload.{ours} keeps them in the host's memory, from train.zero_stage {lowest} on")
    _recompute(keys)


def _recompute(keys: Keys) -> None:
    paths = [f"{NETWORK}.transformer_args.checkpoint_activations", "args.checkpoint_activations"]
    given = {path: keys.flag(path) for path in paths if keys.has(path)}
    value = "full" if any(given.values()) else "none"
    for path, wanted in given.items():
        if wanted == (value == "full"):
            text = "all_but_attention is cheaper: it never attends twice" if wanted else ""
            keys.give(path, "train.recompute", value=value, text=text)
        else:
            keys.drop(path, "the other checkpoint_activations is on")
    if not given:
        keys.assume("train.recompute", value, text=DEFAULT)


def _steps(keys: Keys) -> None:
    if keys.has(path := "args.train_iters"):
        keys.give(path, "train.steps", value=keys.whole(path))
    else:
        keys.assume("train.steps", 10000, text=DEFAULT, fill_in=True)
    every = keys.whole("args.save_interval", 5000)
    keys.settle("args.save_interval", "checkpoint.every", value=every, otherwise=DEFAULT)
    keys.settle("args.log_interval", "log.every", value=keys.whole("args.log_interval", 50), otherwise=DEFAULT)
    if keys.has(path := "args.seed"):
        keys.give(path, "run.seed", value=keys.whole(path))
    if keys.has(path := "args.num_workers"):
        keys.give(path, "data.workers", value=keys.whole(path))


def _warmup(keys: Keys) -> None:
    """SAT warms up over a share of the run and, unless it pre-trains from nothing, holds 5 % of the rate for 100 steps."""
    steps, share = keys.ours["train.steps"], keys.number("args.warmup", 0.01)
    tuned = keys.leaves.get("args.mode", "pretrain") != "pretrain" or keys.has("args.load")
    warmup = min(steps, max(round(share * steps), AUTO_WARMUP if tuned else 0))
    why = f"{share:g} of the steps" + (
        f", at least {AUTO_WARMUP}: SAT holds 5 % of the rate for so long" if tuned else ""
    )
    keys.settle("args.warmup", "train.warmup_steps", value=warmup, otherwise=f"{DEFAULT}: {why}", text=why)
    if keys.has("args.mode"):
        if keys.leaves["args.mode"] == "inference":
            keys.lack("args.mode", "this is a configuration of training; sample with launch/sample.py")
        else:
            keys.elsewhere("args.mode", "train.warmup_steps and model.weights")
    style = keys.text("args.lr_decay_style", "linear").lower()
    schedule, ratio, text = {
        "cosine": ("cosine", keys.number("args.lr_decay_ratio", 0.1), ""),
        "linear": ("cosine", 0.0, "linear in SAT, to nearly 0; half a cosine to 0 has the same mean"),
    }.get(style, ("constant", 1.0, f"{style} in SAT, which keeps the rate constant"))
    keys.settle(
        "args.lr_decay_style", "train.schedule", value=schedule, text=text, otherwise=f"{DEFAULT}: {text or style}"
    )
    if schedule == "cosine" and ratio:
        keys.settle("args.lr_decay_ratio", "train.final_ratio", value=ratio, otherwise=DEFAULT)
    elif schedule == "cosine":
        keys.assume("train.final_ratio", ratio, text="where SAT's line ends")
    if keys.has(path := "args.lr_decay_ratio") and not (schedule == "cosine" and ratio):
        keys.drop(path, "SAT reads it for cosine alone")
    if keys.has(path := "args.lr_decay_iters"):
        if keys.whole(path) == steps:
            keys.elsewhere(path, "train.steps")
        else:
            keys.lack(path, "the rate falls over train.steps")


def _folders(keys: Keys, situation: Situation) -> None:
    paths = [path for path in ("args.save", "args.experiment_name") if keys.has(path)]
    folder = situation.run_dir or "/".join(keys.text(path).rstrip("/") for path in paths)
    for path in paths:
        text = "--run-dir" if situation.run_dir else "no date is added; the same command goes on where it stopped"
        keys.give(path, "run.dir", value=folder or "runs/from-sat", text=text)
    if not paths:
        keys.assume("run.dir", folder or "runs/from-sat", text="--run-dir", fill_in=situation.run_dir is None)
    if keys.has(path := "args.load"):
        keys.give(
            path, "model.weights", value=f"{folder_of(keys.ours['model.preset'])}/transformer",
            text="the same release in diffusers' format; a transformer's checkpoint of SAT's own is not read yet",
        )  # fmt: skip


def _evaluation(keys: Keys) -> None:
    interval, iters, size = "args.eval_interval", "args.eval_iters", "args.eval_batch_size"
    every = keys.leaves.get(interval)
    if every is None or every == 0:
        for path in (interval, iters, size, "args.valid_data"):
            if keys.has(path):
                keys.drop(path, "there is no evaluation without eval_interval")
        return
    keys.give(interval, "validation.every", value=keys.whole(interval))
    clips = keys.whole(iters, 100) * keys.whole(size, keys.whole("deepspeed.train_micro_batch_size_per_gpu", 1))
    text = "clips that no step trains on, drawn once by a hash; their noise is the same in every run"
    keys.settle(iters, "data.held_out", value=clips, otherwise=DEFAULT, text=text)
    if keys.has(size):
        keys.elsewhere(size, "data.held_out is the number of clips; all of them are evaluated")
    if keys.has(path := "args.valid_data"):
        if keys.items(path) == keys.items("args.train_data"):
            keys.drop(path, "it is the training data; data.held_out sets clips of it aside")
        else:
            keys.lack(
                path, f"held-out clips come from data.shards: pack {shown(keys.leaves[path])} with it, or leave it out"
            )


def _sampling(keys: Keys, config: DiTConfig) -> None:
    """Of SAT's inference files, and the size of training where there is none."""
    ours = "validation.sampling"
    path, frames = "args.sampling_image_size", "args.sampling_num_frames"
    size = list(keys.ours["data.sizes"][0])
    if keys.has(path):
        size[1:] = [int(number) for number in keys.numbers(path, count=2)]
    if keys.has(frames):
        latents = keys.whole(frames)
        padding = 1 if config.patch[0] > 1 and latents % config.patch[0] == 0 else 0
        size[0] = 4 * (latents - padding - 1) + 1
    for key in (path, frames):
        if keys.has(key):
            keys.give(
                key, f"{ours}.size", value=size, text="in frames of video, not of latents" if key == frames else ""
            )
    if f"{ours}.size" not in keys.ours:
        keys.assume(f"{ours}.size", size, text="that of data.sizes")
    if keys.has(path := "args.sampling_fps"):
        keys.give(path, f"{ours}.fps", value=keys.number(path))
    else:
        keys.assume(f"{ours}.fps", keys.ours["data.fps"], text="that of data.fps")
    options: dict[str, Any] = {"args.input_file": "--prompts-file FILE", "args.output_dir": "--out FOLDER"}
    for key, option in options.items():
        if keys.has(key):
            keys.elsewhere(key, f"launch/sample.py {option}")
