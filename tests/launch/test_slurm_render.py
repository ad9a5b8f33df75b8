"""Job scripts: what they say to Slurm, and how they judge the end of a job. tests/launch/test_slurm_cluster.py runs them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.slurm import render
from tests.launch.slurm_site import Site, directives, make_site
from tests.launch.world import CONFIG, outcome

RUNNING, CANCELLED = "JobState=RUNNING Reason=None", "JobState=COMPLETING Reason=None"
TIMED_OUT = "JobState=COMPLETING Reason=TimeLimit"
REQUEUE, HOLD = "requeue 7", "requeuehold State=SpecialExit 7"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return make_site(tmp_path)


def all_kinds(site: Site) -> dict[str, str]:
    config = ["--config", str(site.config), "train.steps=3"]
    every = ["--gpus-per-node", "4", "--time", "1-00:00:00", "--cpus-per-rank", "8"]
    return {
        "train": site.render(*config, *every, "--nodes", "1", "--account", "video", "--partition", "gpu,long"),
        "encode": site.render(*config, *every, "--array", "0-15%4", behind=["--out", "my latents"]),
        "evaluate": site.render(
            "--job",
            "evaluate",
            "--gpus-per-node",
            "1",
            "--time",
            "60",
            behind=["vae", "--vae", "x", "--shards", "s", "--out", "q"],
        ),
        "pyxis": site.render(*config, *every, "--container", "nvcr.io#nvidia/pytorch:25.06-py3"),
        "apptainer": site.render(*config, *every, "--container", "/images/a b$(c).sif", "--no-requeue"),
    }


def test_scripts_are_clean_bash(site: Site) -> None:
    files = [*map(str, render.FOLDER.glob("*.sh"))]
    for kind, text in all_kinds(site).items():
        files.append(str(site.root / kind))
        Path(files[-1]).write_text(text)
        assert subprocess.run(["bash", "-n", files[-1]], check=False, capture_output=True, text=True).stderr == ""
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck: apt-get install shellcheck")
    command = ["shellcheck", "--external-sources", f"--source-path={render.FOLDER}", *files]
    checked = subprocess.run(command, check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_what_slurm_is_asked_for(site: Site) -> None:
    kinds = all_kinds(site)
    common = ["--time=1-00:00:00", "--nodes=1", "--ntasks-per-node=4"]
    assert directives(kinds["train"]) == [
        "--job-name=train", *common, "--output=%x-%j.out", "--open-mode=append", "--requeue", "--gpus-per-node=4",
        "--cpus-per-task=8", "--account=video", "--partition=gpu,long", "--signal=B:USR1@300",
    ]  # fmt: skip
    assert directives(kinds["encode"]) == [
        "--job-name=encode", *common, "--output=%x-%A_%a.out", "--open-mode=append", "--requeue", "--gpus-per-node=4",
        "--cpus-per-task=8", "--array=0-15%4",
    ]  # fmt: skip
    assert "--no-requeue" in directives(kinds["apptainer"])
    # One GPU on a node is a layout as any other, and so is none.
    one = site.render("--config", str(site.config), "--nodes", "4", "--gpus-per-node", "1", "--time", "60")
    assert directives(one)[1:6] == [
        "--time=60", "--nodes=4", "--ntasks-per-node=1", "--output=%x-%j.out", "--open-mode=append",
    ]  # fmt: skip
    assert not [line for line in directives(site.train()) if "gpu" in line]


def test_the_ranks_get_the_command_and_the_container(site: Site) -> None:
    kinds, launch = all_kinds(site), render.PROJECT / "launch"
    srun = ["--kill-on-bad-exit=0", "--wait=300", "--cpus-per-task=8", "--"]
    command = ["--config", str(site.config), "train.steps=3"]
    site.run(kinds["train"])
    assert site.called() == [*srun, sys.executable, str(launch / "train_dit.py"), *command]
    assert site.run(kinds["encode"]) == 0
    assert site.called()[-3:] == ["train.steps=3", "--out", "my latents"]
    seen = [str(render.PROJECT), str(site.root), str(site.root / "run")]
    mounts = ",".join(f"{path}:{path}" for path in seen)
    site.run(kinds["pyxis"])
    assert site.called() == [
        "--container-image=nvcr.io#nvidia/pytorch:25.06-py3", f"--container-mounts={mounts}",
        f"--container-workdir={site.root}", *srun, "python3", str(launch / "train_dit.py"), *command,
    ]  # fmt: skip
    site.run(kinds["apptainer"], SLURM_GPUS_ON_NODE="4")
    binds = [word for path in seen for word in ("--bind", f"{path}:{path}")]
    assert site.called() == [
        *srun, "apptainer", "exec", "--pwd", str(site.root), "--nv", *binds, "/images/a b$(c).sif", "python3",
        str(launch / "train_dit.py"), *command,
    ]  # fmt: skip


def test_the_clusters_lines_are_in_one_file_which_stays(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(site.root)
    (site.root / "jobs" / "env.sh").unlink()
    arguments = [
        "--config", str(site.config), "--gpus-per-node", "0", "--time", "60", "--out", "jobs/a.sbatch", "--", "--new-data",
    ]  # fmt: skip
    assert outcome("render", lambda: render.main(arguments))[0] == 0
    shipped = (render.FOLDER / "env.sh").read_text()
    assert (site.root / "jobs" / "env.sh").read_text() == shipped
    own = "PYTHON=/opt/envs/python\nSRUN_OPTIONS=(--mpi=none)\nexport MASTER_ADDR=ib0\n"
    (site.root / "jobs" / "env.sh").write_text(own)
    code, stdout, stderr = outcome("render", lambda: render.main(arguments))
    assert (code, stderr) == (0, "")
    assert stdout.endswith("  sbatch jobs/a.sbatch\n")
    assert (site.root / "jobs" / "env.sh").read_text() == own
    site.run((site.root / "jobs" / "a.sbatch").read_text())
    assert site.called()[:5] == ["--mpi=none", "--kill-on-bad-exit=0", "--wait=300", "--", "/opt/envs/python"]
    assert site.called()[-1] == "--new-data"
    code, _, stderr = outcome("render", lambda: render.main([*arguments[:-4], "--out", str(site.config)]))
    assert code == 78
    assert "exists and was not written by this command" in stderr
    assert site.config.read_text() == CONFIG.replace("WORLD", str(site.root))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "soon"], "--time must be like 1-12:00:00, found 'soon'"),
        (["--time", "0"], "--time must be more than nothing"),
        (["--time", "5"], "--signal-margin 300 must be from 1 to 65535 and leave more than a minute of --time, which is 300 s"),
        (["--account", "a b"], "--account must be like video, found 'a b'"),
        (["--partition", "x\n#SBATCH --uid=0"], "--partition must be like gpu,long, found 'x\\n#SBATCH --uid=0'"),
        (["--nodes", "3"], "data.packs_per_step 4 does not divide over 3 data-parallel ranks"),
        (["--array", "0-3", "--job", "train"], "--array belongs to --job encode"),
        (["--array", "0-3"], "an encoding needs to know where to"),
        (["--job", "evaluate"], "an evaluation takes its arguments at the end"),
        (["--config", "none.yaml"], "none.yaml: no such configuration file"),
        (["--config", "CONFIG", "train.stepz=3"], "train.stepz"),
        (["--config", "CONFIG", 'run.dir="a\\tb"'], "a\\tb' holds a control character"),
        (["--python", "a\udcffb"], "--python 'a\\udcffb' is not UTF-8"),
        (["--config", "CONFIG", "run.dir=a:b", "--container", "x.sif"], "must have no colon and no comma"),
        (["--config=--new-data"], "looks like an option"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line_before_it_queues(
    site: Site, arguments: list[str], message: str
) -> None:
    given = [str(site.config) if word == "CONFIG" else word for word in arguments]
    config = (
        []
        if "evaluate" in arguments or any("--config" in word for word in arguments)
        else ["--config", str(site.config)]
    )
    limit = [] if "--time" in arguments else ["--time", "60"]
    out = ["--gpus-per-node", "0", "--out", str(site.root / "jobs" / "job.sbatch")]
    code, stdout, stderr = outcome("render", lambda: render.main([*config, *given, *limit, *out]))
    assert code in (1, 78)
    assert message in stderr
    assert stderr.count("\n") == 1
    assert stdout == ""
    assert not (site.root / "jobs" / "job.sbatch").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("2:00:30", 7230), ("1-12", 129600), ("1-12:30", 131400), ("1-12:30:15", 131415)],
)
def test_limits_are_read_as_sbatch_reads_them(time: str, seconds: int) -> None:
    assert render.seconds_of(time) == seconds


def says(code: int) -> str:
    return f'{{"code": {code}, "reason": "of the 3 \\"code\\" words", "time": 1.5}}'


@pytest.mark.parametrize(
    ("ends", "said", "facts", "restarts", "left", "commands"),
    [
        (0, says(0), RUNNING, 0, 0, []),
        (1, says(0), RUNNING, 0, 0, []),  # a rank that stumbled after the end
        (0, says(75), RUNNING, 0, 75, [REQUEUE]),  # srun has been seen to say 0, 143 and 1
        (143, says(75), RUNNING, 9, 75, [REQUEUE]),
        (1, says(76), RUNNING, 9, 76, [REQUEUE]),
        (1, says(93), RUNNING, 3, 93, [HOLD]),
        (1, says(78), RUNNING, 0, 78, [HOLD]),
        (1, says(70), RUNNING, 0, 70, [HOLD]),
        (78, "", RUNNING, 0, 78, [HOLD]),  # refused before there was a run
        (75, "", RUNNING, 0, 75, [REQUEUE]),
        (137, "", RUNNING, 2, 137, [REQUEUE]),  # killed
        (137, "", RUNNING, 3, 137, [HOLD]),
        (0, "", RUNNING, 0, 137, [REQUEUE]),  # no word of an end
        (75, says(75), CANCELLED, 0, 75, []),  # the user's scancel stands
        (75, says(75), TIMED_OUT, 0, 75, [REQUEUE]),
        (143, "", TIMED_OUT, 7, 143, [REQUEUE]),
        (1, says(70), TIMED_OUT, 0, 70, [HOLD]),
    ],
)
def test_how_a_training_ended_decides_whether_it_goes_on(
    site: Site, ends: int, said: str, facts: str, restarts: int, left: int, commands: list[str]
) -> None:
    status = site.root / "run" / "exit_status.json"
    status.parent.mkdir()
    status.write_text(says(75))  # of the attempt before
    variables = {
        "STATUS": str(status),
        "ENDS": str(ends),
        "SAYS": said,
        "FACTS": facts,
        "SLURM_RESTART_COUNT": str(restarts),
    }
    assert site.run(site.train(), **variables) == left
    assert site.asked() == commands
    assert site.run(site.train("--no-requeue"), **variables) == left
    assert site.asked() == []


@pytest.mark.parametrize(
    ("ends", "left", "commands"), [(0, 0, []), (1, 1, [HOLD]), (76, 76, [REQUEUE]), (137, 137, [REQUEUE])]
)
def test_an_encoding_is_judged_by_its_code(site: Site, ends: int, left: int, commands: list[str]) -> None:
    assert site.run(all_kinds(site)["encode"], ENDS=str(ends), FACTS=RUNNING) == left
    assert site.asked() == commands


def test_the_schedulers_signal_reaches_the_ranks_and_the_shell_outlives_its_own(site: Site) -> None:
    status = site.root / "run" / "exit_status.json"
    process = site.start(site.train(), STATUS=str(status), SAYS=says(75), FACTS=RUNNING, WAITS="1")
    records, end = site.root / "records", time.monotonic() + 30
    while not (records / "up").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # which Slurm gives to every process; the ranks got it from Slurm
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert (records / "signals").read_text() == "USR1\n"
    assert site.asked() == [REQUEUE]


def test_what_another_launcher_left_in_the_shell_does_not_reach_the_ranks(site: Site) -> None:
    (site.root / "bin" / "srun").write_text('#!/bin/bash\nenv > "$RECORDS/srun"\nexit 1\n')
    site.run(
        site.train(), RANK="3", WORLD_SIZE="8", LOCAL_RANK="3", MASTER_ADDR="elsewhere", MASTER_PORT="1", FACTS=RUNNING
    )
    seen = dict(line.split("=", 1) for line in (site.root / "records" / "srun").read_text().splitlines() if "=" in line)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} & seen.keys()
    assert seen["PYTHONPATH"].split(":")[0] == str(render.PROJECT)
