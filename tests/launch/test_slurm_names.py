"""Names in job scripts are data, whatever they hold: in the bash of this machine, with srun noting what reaches it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from cogvideo_dist.config.load import ConfigError
from launch.slurm import render
from tests.launch.slurm_site import Site, directives, make_site

TOUCH = (
    "$(touch canary)", "`touch canary`", "';touch canary;'", '";touch canary;"', ";touch canary;", "&touch canary&",
    "|touch canary",
    ">canary", "a\ntouch canary\n", "a\r\ntouch canary", "a\n#SBATCH --uid=0", "${IFS}touch${IFS}canary", "$'\\n'touch canary",
    "\\';touch canary;\\'", "a\u2028touch canary", "<(touch canary)", "a)\ntouch canary\nB=(", "${x:=$(touch canary)}",
    "x'$(touch canary)'",
)  # fmt: skip
"""What runs where a name is taken for a part of the script."""

ODD = (
    "a b", " a", "a ", "'", '"', "\\", "a\\", "$", "$$", "$#", "${", "((", "))", "{a,b}", "*", "?", "[a-z]", "~", "~root",
    "!!", "#", "#SBATCH",
    "-", "--", "-rf", "--help", "@COMMAND@", "@RUN@", "%j", "=", "a=b", "\u202e", "\U0001f3ac", "\u00e9", "\x7f",
    "\x1b[31m", "\x01", "x" * 200,
)  # fmt: skip
LETTERS = "ab0 '\"`$(){}[]<>|&;*?!#~\\=%^@,:+-_.\u00e9\u65e5\u2028\x7f\x1b\n\r\t"


def hostile(count: int) -> list[str]:
    """Those above and random ones."""
    seed = random.SystemRandom().randrange(10**6)
    print(f"random names of seed {seed}")
    draw = random.Random(seed)
    drawn = ["".join(draw.choices(LETTERS, k=draw.randrange(1, 24))) for _ in range(count)]
    return [*TOUCH, *ODD, *drawn][:count]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


Field = Callable[[Site, str], tuple[str, str]]
"""A script with a name in one place, and the word in which srun has to find it."""


def as_run(site: Site, name: str) -> tuple[str, str]:
    word = f"run.dir={json.dumps(name, ensure_ascii=False)}"
    return site.train(word), word


def as_file(site: Site, name: str) -> tuple[str, str]:
    file = f"{name}.yaml"
    (site.root / file).write_text(site.config.read_text())
    return site.render("--config", file, "--gpus-per-node", "0", "--time", "60"), file


def as_folder(site: Site, name: str) -> tuple[str, str]:
    folder = site.root / f"in {name}"
    folder.mkdir(exist_ok=True)
    arguments = ["--config", str(site.config), "--gpus-per-node", "0", "--time", "60", "--container", "image"]
    return site.render(*arguments, folder=folder), f"--container-workdir={folder}"


def as_jobs(site: Site, name: str) -> tuple[str, str]:
    jobs = site.root / f"jobs {name}"
    jobs.mkdir(exist_ok=True)
    (jobs / "env.sh").write_text("PYTHON=/of/this/folder")
    arguments = [
        "--config",
        str(site.config),
        "--gpus-per-node",
        "0",
        "--time",
        "60",
        "--out",
        str(jobs / "job.sbatch"),
    ]
    return render.script(render.parser().parse_args(arguments), [], folder=site.root), "/of/this/folder"


def as_image(site: Site, name: str) -> tuple[str, str]:
    return site.train(f"--container={name}", "--container-runtime=pyxis"), f"--container-image={name}"


def as_sif(site: Site, name: str) -> tuple[str, str]:
    return site.train(f"--container={name}", "--container-runtime=apptainer"), name


def as_python(site: Site, name: str) -> tuple[str, str]:
    return site.train(f"--python={name}"), name


def as_argument(site: Site, name: str) -> tuple[str, str]:
    arguments = ["--config", str(site.config), "--array", "0-3", "--gpus-per-node", "0", "--time", "60"]
    return site.render(*arguments, behind=["--out", name]), name


FIELDS: tuple[Field, ...] = (as_run, as_file, as_folder, as_jobs, as_image, as_sif, as_python, as_argument)


def taken(site: Site, names: Sequence[str], *, field: Field) -> list[str]:
    """Which of ``names`` are not refused; each of these reaches srun as one word of the same script."""
    plain, _ = field(site, "plain")
    site.run(plain)
    words, found = len(site.called()), []
    for name in names:
        try:
            text, word = field(site, name)
        except (
            ConfigError,
            OSError,
            SystemExit,
        ):  # control characters, and what YAML, the file system or argparse refuse
            continue
        assert directives(text) == directives(plain), (field, name)
        site.run(text)
        assert word in site.called(), (field, name)
        assert len(site.called()) == words, (field, name)
        found.append(name)
    assert not list(site.root.rglob("canary")), field
    return found


def test_names_in_scripts_are_data(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in some of the places; all in all of them in make test-long."""
    monkeypatch.chdir(site.root)
    names = hostile(len(TOUCH) + len(ODD))
    for number, field in enumerate(FIELDS):
        part = names[number :: len(FIELDS)]
        assert len(taken(site, part, field=field)) > len(part) // 3


@pytest.mark.long
@pytest.mark.parametrize("field", FIELDS)
def test_no_name_anywhere_in_a_script_is_anything_but_data(
    site: Site, monkeypatch: pytest.MonkeyPatch, field: Field
) -> None:
    monkeypatch.chdir(site.root)
    assert len(taken(site, hostile(500), field=field)) > 150


def test_unquoted_they_would_not_be(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the check above can fail."""
    monkeypatch.setattr(render.shlex, "quote", str)
    for name in TOUCH[:4]:
        site.run(as_argument(site, name)[0])
    assert list(site.root.rglob("canary"))


@pytest.mark.parametrize("option", render.PLAIN)
def test_sbatchs_own_values_are_plain_or_refused(option: str) -> None:
    options = render.parser().parse_args(["--gpus-per-node", "0", "--time", "60", "--array", "0-3", "--out", "x"])
    count, refused, names = len(render.directives("encode", options, ranks=1)), 0, hostile(500)
    more = option in ("account", "partition", "qos", "constraint", "mem")
    for name in [*names, render.PLAIN[option].example]:
        setattr(options, option, name)
        try:
            found = render.directives("encode", options, ranks=1)
        except ConfigError as error:
            assert str(error).startswith(f"--{option} must be ")
            refused += 1
            continue
        assert f"--{'job-name' if option == 'name' else option}={name}" in found
        assert len(found) == count + more
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._@&|,:%-")
    assert 400 < refused <= len(names)


@pytest.mark.parametrize("word", ["--array=--", "--python=--", "--container=--"])
def test_a_value_that_is_the_separator_is_refused(site: Site, word: str) -> None:
    with pytest.raises(ConfigError, match="must not be --"):
        site.train(word)
