"""Write a Slurm job script: python launch/slurm/render.py --config FILE [key=value ...] --nodes N ... --out job.sbatch"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError, load_config, read_merged
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.data.loader import check_ranks
from cogvideo_dist.parallel.mesh import choose_layout
from launch.environment import run_command, split_config

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parents[1]
MARK = "# Written by launch/slurm/render.py"

Kind = Literal["train", "encode", "evaluate"]

NAME = "[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"


class Plain(NamedTuple):
    """A value that goes into an ``#SBATCH`` line as it is: nothing but what ``pattern`` allows."""

    pattern: str
    example: str
    help: str


PLAIN = {
    "time": Plain("([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{1,2}){0,2}", "1-12:00:00", "limit: minutes, h:mm:ss or days-h:mm:ss"),
    "name": Plain(NAME, "my-run", "the job's name; left out, what it does"),
    "account": Plain(NAME, "video", "whom it is charged to"),
    "partition": Plain(f"{NAME}(,{NAME})*", "gpu,long", "where it may run"),
    "qos": Plain(NAME, "high", "quality of service"),
    "constraint": Plain("[A-Za-z0-9][A-Za-z0-9._@&|,-]{0,127}", "h100&ib", "features that its nodes must have"),
    "mem": Plain("[0-9]{1,7}[KMGT]?", "500G", "memory of each node, 0 for all of it"),
    "array": Plain("[0-9]{1,7}(-[0-9]{1,7}(:[0-9]{1,4})?)?(%[0-9]{1,4})?", "0-7%4", "tasks of an encoding, evenly spaced"),
}  # fmt: skip

EXAMPLES = """examples:
  python launch/slurm/render.py --config my.yaml --nodes 4 --gpus-per-node 8 --time 1-00:00:00 --out jobs/train.sbatch
  python launch/slurm/render.py --config my.yaml --array 0-15 --gpus-per-node 1 --time 8:00:00 --out jobs/encode.sbatch \\
    -- --out my-latents
  python launch/slurm/render.py --job evaluate --gpus-per-node 1 --time 60 --out jobs/evaluate.sbatch \\
    -- vae --vae runs/vae --shards my-shards --out quality"""

COMMANDS = {"encode": "encode.py", "evaluate": "evaluate.py"}


def main(arguments: Sequence[str] | None = None) -> None:
    own, behind = _split(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(own)
    text = script(options, behind, folder=Path.cwd())
    out = Path(options.out).absolute()
    write(out, text)
    print(f"{options.out} written, and {out.parent / 'env.sh'} has what depends on the cluster; start it with")
    print(f"  sbatch {shlex.quote(options.out)}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description="Write the script of a Slurm job, and beside it env.sh, which holds what depends on the cluster and is "
        "yours to edit. A configuration is checked, with the number of ranks, before anything is written.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        usage="render.py --config FILE [key=value ...] --nodes N --gpus-per-node G --time T [option ...] --out job.sbatch "
        "[-- argument of the command ...]",
    )  # fmt: skip
    found.add_argument(
        "--config", nargs="+", default=[], metavar="FILE|key=value", help="as the command itself takes it"
    )
    found.add_argument("--job", choices=("train", "encode", "evaluate"), help="left out: train, or encode with --array")
    found.add_argument("--nodes", type=_positive, default=1)
    found.add_argument("--gpus-per-node", type=_count, required=True, help="0 on a cluster without GPUs")
    found.add_argument("--ranks-per-node", type=_positive, help="left out: one for each GPU, or one")
    found.add_argument("--cpus-per-rank", type=_positive, help="left out: what the cluster gives, often one")
    found.add_argument("--exclusive", action="store_true", help="share the nodes with no other job")
    for name, plain in PLAIN.items():
        found.add_argument(
            f"--{name}", required=name == "time", metavar=plain.example, help=plain.help.replace("%", "%%")
        )
    found.add_argument(
        "--requeue", action=argparse.BooleanOptionalAction, default=True,
        help="whether a job that was stopped or killed goes back into the queue",
    )  # fmt: skip
    found.add_argument(
        "--signal-margin", type=_count, default=300, metavar="SECONDS",
        help="how long before its limit a training is told to save (%(default)s); Slurm may come a minute early",
    )  # fmt: skip
    found.add_argument(
        "--container", metavar="IMAGE", help="run inside of it: an .sif by apptainer, any other by pyxis"
    )
    found.add_argument("--container-runtime", choices=("pyxis", "apptainer"), help="against that rule")
    found.add_argument("--python", help="left out: this one, or the container's python3")
    found.add_argument("--out", required=True, metavar="job.sbatch", help="the script")
    return found


def script(options: argparse.Namespace, behind: Sequence[str], *, folder: Path) -> str:
    """The job's text; ``behind``: further arguments of its command, which runs in ``folder``. Raises ``ConfigError``."""
    if empty := [name for name, value in vars(options).items() if value == [] and name != "config"]:
        raise ConfigError(f"--{empty[0]} must not be --")  # which argparse takes for a separator
    kind: Kind = options.job or ("encode" if options.array else "train")
    ranks = options.ranks_per_node or options.gpus_per_node or 1
    values = {
        "PROJECT": quoted(str(PROJECT), "the project's folder"),
        "WORKDIR": quoted(str(folder), "the working directory"),
        "ENVIRONMENT": quoted(str(Path(options.out).absolute().parent / "env.sh"), "--out"),
        "PYTHON": quoted(options.python or ("python3" if options.container else sys.executable), "--python"),
        "REQUEUE": str(int(options.requeue)),
        "STEP": f" --cpus-per-task={options.cpus_per_rank}" if options.cpus_per_rank else "",
    }
    seen = ["PROJECT", "WORKDIR"]
    if kind == "train":
        name, run = _training(options, world=options.nodes * ranks, node=ranks)
        values["RUN"] = quoted(str(folder / run), "run.dir")
        seen.append("RUN")
    else:
        name = _worker(kind, options, behind)
    words = [str(PROJECT / "launch" / name), *(["--config", *options.config] if options.config else []), *behind]
    values["COMMAND"] = " ".join(quoted(word, "an argument") for word in words)
    values["DIRECTIVES"] = "\n#SBATCH ".join(directives(kind, options, ranks=ranks))
    values["CONTAINER"] = _container(options, [values[name] for name in seen], names=seen)
    template = (FOLDER / f"{kind}.sbatch").read_text(encoding="utf-8")
    # One pass: what a value says is never a place for another one.
    return re.sub(r"@([A-Z]+)@", lambda place: values[place[1]], template)


def directives(kind: Kind, options: argparse.Namespace, *, ranks: int) -> list[str]:
    """Options of sbatch, one a line."""
    for name, plain in PLAIN.items():
        value = getattr(options, name)
        if value is not None and not re.fullmatch(plain.pattern, value):
            raise ConfigError(f"--{name} must be like {plain.example}, found {value!r}")
    limit = seconds_of(options.time)
    if limit == 0:
        raise ConfigError("--time must be more than nothing")
    found = [
        f"--job-name={options.name or kind}", f"--time={options.time}", f"--nodes={options.nodes}",
        f"--ntasks-per-node={ranks}",
        f"--output=%x-{'%A_%a' if options.array else '%j'}.out", "--open-mode=append",
        "--requeue" if options.requeue else "--no-requeue",
    ]  # fmt: skip
    if options.gpus_per_node:
        found.append(f"--gpus-per-node={options.gpus_per_node}")
    if options.cpus_per_rank:
        found.append(f"--cpus-per-task={options.cpus_per_rank}")
    if options.exclusive:
        found.append("--exclusive")
    for name in ("account", "partition", "qos", "constraint", "mem", "array"):
        if getattr(options, name) is not None:
            found.append(f"--{name}={getattr(options, name)}")
    if kind == "train":
        found.append(f"--signal=B:USR1@{_margin(options.signal_margin, limit)}")
    return found


def _margin(margin: int, limit: int) -> int:
    """Seconds before the limit, which must leave time to train; Slurm may signal a minute early."""
    if not 0 < margin < 2**16 or margin + 60 >= limit:
        raise ConfigError(
            f"--signal-margin {margin} must be from 1 to 65535 and leave more than a minute of --time, which is {limit} s"
        )
    return margin


def seconds_of(time: str) -> int:
    """Of minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, *(*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _training(options: argparse.Namespace, *, world: int, node: int) -> tuple[str, str]:
    """(file of the command, folder of the run); refuses what could not run on that many ranks."""
    if options.array:
        raise ConfigError("--array belongs to --job encode: the tasks of a training would all write one run")
    if not options.config:
        raise ConfigError("--config must name the configuration of the training")
    config = _config(options.config)
    if isinstance(config, DiTRun):
        heads = config.model.transformer().heads
        check_ranks(config.data.packs_per_step, choose_layout(config.parallel, world=world, heads=heads, node=node).dp)
        return "train_dit.py", config.run.dir
    if world % config.parallel.cp:
        raise ConfigError(f"parallel.cp {config.parallel.cp} does not divide {world} ranks")
    check_ranks(config.data.packs_per_step, world // config.parallel.cp)
    return "train_vae.py", config.run.dir


def _config(items: Sequence[str]) -> DiTRun | VAERun:
    """Of the transformer if a preset is named, which an autoencoder has not."""
    if wrong := [item for item in items if item.startswith("-")]:
        raise ConfigError(f"--config {wrong[0]!r} looks like an option; write ./{wrong[0]}")
    split = split_config(items)
    merged, _ = read_merged(split["files"])
    model = merged.get("model")
    preset = isinstance(model, dict) and "preset" in model
    if preset or any(text.startswith("model.preset=") for text in split["overrides"]):
        return load_config(DiTRun, **split)
    return load_config(VAERun, **split)


def _worker(kind: Kind, options: argparse.Namespace, behind: Sequence[str]) -> str:
    """File of the command of a job that is no training."""
    if kind == "encode":
        if not any(word == "--out" or word.startswith("--out=") for word in behind):
            raise ConfigError("an encoding needs to know where to: end the command with -- --out SHARDS")
        if options.nodes != 1:
            raise ConfigError(f"--nodes {options.nodes}: a task of an array takes one node; take more tasks")
        if not isinstance(_config(options.config), DiTRun):
            raise ConfigError(
                "--config must be that of a transformer's run (model.preset), whose data is to be encoded"
            )
        return COMMANDS[kind]
    if options.config or not behind:
        raise ConfigError("an evaluation takes its arguments at the end: -- vae --vae RUN --shards SHARDS --out FOLDER")
    if options.array or options.nodes != 1 or options.gpus_per_node > 1 or (options.ranks_per_node or 1) > 1:
        raise ConfigError("an evaluation is one process: --nodes 1 --gpus-per-node 1, no --array")
    return COMMANDS[kind]


def _container(options: argparse.Namespace, folders: Sequence[str], *, names: Sequence[str]) -> str:
    """A call of the function in env.sh that enters it; empty without one."""
    if not options.container:
        return ""
    if wrong := [folder for folder in folders if ":" in folder or "," in folder]:
        raise ConfigError(
            f"containers cannot be given {wrong[0]}: a folder that they see must have no colon and no comma"
        )
    runtime = options.container_runtime or ("apptainer" if options.container.endswith(".sif") else "pyxis")
    return " ".join([f"enter_{runtime}", quoted(options.container, "--container"), *(f'"${name}"' for name in names)])


def quoted(text: str, what: str) -> str:
    """One word of bash, whatever ``text`` holds. Control characters have no business in names, and old shells change some."""
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        raise ConfigError(f"{what} {text!r} holds a control character, such as the end of a line; rename it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{what} {text!r} is not UTF-8; rename it") from None
    return shlex.quote(text)


def write(out: Path, text: str) -> None:
    """The script, executable, over an earlier one of its kind; env.sh beside it where there is none."""
    if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace")[:200]:
        raise ConfigError(f"--out {out} exists and was not written by this command; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    out.chmod(0o755)
    environment = out.parent / "env.sh"
    try:
        with environment.open("x", encoding="utf-8") as file:
            file.write((FOLDER / "env.sh").read_text(encoding="utf-8"))
    except FileExistsError:
        return


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text):
        raise argparse.ArgumentTypeError(f"must be a whole number, found {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not (number := _count(text)):
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands before and behind the first ``--``."""
    words = list(arguments)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


if __name__ == "__main__":
    run_command("render", main)
