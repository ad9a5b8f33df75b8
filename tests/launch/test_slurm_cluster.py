"""Rendered scripts on a real cluster of two nodes (tests/launch/slurm_cluster.py): trainings over both, and arrays."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from cogvideo_dist.engine.checkpoint import newest
from cogvideo_dist.parallel.mesh import Place
from launch import encode
from launch.environment import read_place
from launch.slurm import render
from launch.slurm.place import port_of
from tests.killing import tree
from tests.launch.commands import FREQUENT, last_step
from tests.launch.holding import HELD
from tests.launch.slurm_cluster import NODES, Cluster, missing, running_cluster, until
from tests.launch.test_train import STEPS, assert_bitwise, assert_same_losses
from tests.launch.world import CONFIG, World, outcome, steps_of

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(900)]

HELD_AT = 4
"""Of ``STEPS``, with a checkpoint behind the third."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def rendered(jobs: Path, *arguments: str, gpus: int = 0, behind: Sequence[str] = ()) -> Path:
    """A script for this cluster, by the command."""
    jobs.mkdir(parents=True, exist_ok=True)
    script = jobs / "job.sbatch"
    words = [*arguments, "--gpus-per-node", str(gpus), "--time", "20", "--out", str(script), "--", *behind]
    code, _, stderr = outcome("render", lambda: render.main(words))
    assert code == 0, stderr
    return script


def training(world: World, run: Path) -> Path:
    overrides = world.overrides(run, *FREQUENT)
    return rendered(Path(f"{run} jobs"), "--config", str(world.file), *overrides, "--nodes", "2")


def holding(jobs: Path, *words: str) -> None:
    """What is rendered into ``jobs`` waits in its first attempt, as tests/launch/holding.py says."""
    jobs.mkdir(parents=True)
    inside = shlex.join([str(Path(__file__).parent / "holding.py"), *words])
    (jobs / "env.sh").write_text(f'INSIDE=("$PYTHON" {inside})\n')


def printed(script: Path, job: str) -> str:
    return "".join(path.read_text() for path in script.parent.glob(f"*-{job}*.out"))


@pytest.fixture(scope="module")
def trained(cluster: Cluster, world: World) -> Path:
    """A run on both nodes, undisturbed, in a folder whose name would be a command."""
    run = world.root / "both nodes' $(touch canary)"
    script = training(world, run)
    job = cluster.submit(script)
    facts = ended(cluster, job)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0"), printed(script, job)
    return run


def ended(cluster: Cluster, job: str) -> dict[str, str]:
    """The job's facts when it is over, held, or back in the queue."""

    def over() -> dict[str, str]:
        facts = cluster.facts(job)
        waits = facts["JobState"] == "PENDING" and facts["Restarts"] == "0"
        return {} if waits or facts["JobState"] in ("RUNNING", "COMPLETING", "CONFIGURING") else facts

    return until(over, what=f"the end of job {job}", also=lambda: cluster.facts(job))


def test_a_rendered_training_runs_on_two_nodes(trained: Path, whole: Path, world: World) -> None:
    """As one process does, up to the order of sums."""
    assert_same_losses(trained, whole)
    assert not list(world.root.rglob("canary"))


def test_scripts_are_what_sbatch_takes(cluster: Cluster, world: World, tmp_path: Path) -> None:
    config, options = ["--config", str(world.file)], ["--partition", "test", "--cpus-per-rank", "2", "--mem", "512M"]
    evaluation = ["vae", "--vae", "x", "--shards", "y", "--out", "z"]
    scripts = [
        rendered(tmp_path / "train", *config, *options, "--nodes", "2"),
        rendered(tmp_path / "gpus", *config, *options, "--nodes", "2", "--exclusive", gpus=2),
        rendered(tmp_path / "image", *config, "--nodes", "2", "--container", "image", "--no-requeue"),
        rendered(tmp_path / "encode", *config, *options, "--array", "1-7:2%2", behind=["--out", "latents"]),
        rendered(tmp_path / "evaluate", "--job", "evaluate", *options, gpus=1, behind=evaluation),
    ]
    for script in scripts:
        assert "to start at" in cluster.run("sbatch", "--test-only", str(script)).stderr
    for refused in (
        rendered(tmp_path / "nodes", *config, "--nodes", "4"),
        rendered(tmp_path / "more gpus", *config, gpus=4),
        rendered(tmp_path / "partition", *config, "--partition", "no-such"),
    ):
        assert cluster.run("sbatch", "--test-only", str(refused), check=False).returncode == 1


def test_srun_says_what_a_rank_has_to_know(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "--", "bash", "-c", 'env -0 > "environment.$SLURM_PROCID"')
    for rank in range(4):
        variables = environment_of(cluster.root / f"environment.{rank}")
        with monkeypatch.context() as patch:
            for name in [
                name for name in os.environ if name.startswith(("SLURM_", "RANK", "WORLD_", "LOCAL_", "MASTER_"))
            ]:
                patch.delenv(name)
            for name, value in variables.items():
                patch.setenv(name, value)
            port = port_of(int(variables["SLURM_JOB_ID"]), 0, step=0)
            assert read_place() == Place(rank, 4, rank % 2, f"{NODES[0]}:{port}", 2)


def environment_of(path: Path) -> dict[str, str]:
    """What of it Slurm has set."""
    lines = path.read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in lines if line.startswith("SLURM_"))


@pytest.mark.long
def test_an_array_encodes_a_set_although_one_of_its_tasks_is_killed(
    cluster: Cluster, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out, jobs = tmp_path / "latents", tmp_path / "jobs"
    holding(jobs, "item", str(tmp_path), "4")
    script = rendered(jobs, "--config", str(world.file), "--array", "0-3", behind=["--out", str(out)])
    array = cluster.submit(script)

    def third() -> dict[str, str]:
        if (tmp_path / "held").exists():
            for process in cluster.processes(sys.executable, "encode.py", str(out)):
                variables = environment_of(Path(f"/proc/{process}/environ"))
                if variables["SLURM_ARRAY_TASK_ID"] == HELD and "SLURM_STEP_ID" in variables:
                    return {**variables, "process": str(process)}
        return {}

    found = until(third, what="the third task at work", also=lambda: printed(script, array))
    os.kill(int(found["process"]), signal.SIGKILL)
    cluster.start_soon(found["SLURM_JOB_ID"])
    cluster.wait(found["SLURM_JOB_ID"], "COMPLETED", "FAILED", "SPECIAL_EXIT", restarts=1)
    for number in range(4):
        facts = ended(cluster, f"{array}_{number}")
        assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), printed(script, array)
        assert facts["Restarts"] == str(int(str(number) == HELD))
    monkeypatch.setattr("sys.argv", ["encode.py", "--config", str(world.file), "--out", str(tmp_path / "alone")])
    code, _, stderr = outcome("encode", encode.main)
    assert code == 0, stderr
    assert tree(out) == tree(tmp_path / "alone")


RANK = """\
#!/bin/bash
# In the place of a training's interpreter: what its ranks say at their end, without what they compute.
say() { printf '{"code": %s}' "$1" > "$STATUS"; exit "$1"; }
trap 'say 75' USR1 TERM
touch "$UP.$SLURM_PROCID.${SLURM_RESTART_COUNT:-0}"
if [[ $ENDS == signal ]]; then
  for _ in {1..1200}; do sleep 0.1; done
fi
say "$ENDS"
"""


def ending(cluster: Cluster, folder: Path, ends: str) -> str:
    """The number of a job on both nodes whose ranks run and end with a code, or wait for a signal; started again, with 0."""
    folder.mkdir()
    (folder / "tiny.yaml").write_text(CONFIG.replace("WORLD", str(folder)))
    (folder / "rank").write_text(RANK)
    (folder / "rank").chmod(0o755)
    (folder / "env.sh").write_text(
        f"PYTHON={folder}/rank\nexport STATUS={folder}/run/exit_status.json UP={folder}/up ENDS={ends}\n"
        '[[ ${SLURM_RESTART_COUNT:-0} == 0 ]] || ENDS=0\n'
    )  # fmt: skip
    job = cluster.submit(rendered(folder, "--config", str(folder / "tiny.yaml"), "--nodes", "2"))
    until(
        lambda: {"up": "2"} if len([*folder.glob("up.*.0")]) == 2 else {},
        what="two ranks", also=lambda: printed(folder / "job.sbatch", job),
    )  # fmt: skip
    return job


def test_the_end_of_the_run_is_that_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    facts = ended(cluster, ending(cluster, tmp_path / "end", "0"))
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("COMPLETED", "0:0", "0")


def test_a_refused_training_is_held_until_somebody_has_looked(cluster: Cluster, tmp_path: Path) -> None:
    job = ending(cluster, tmp_path / "refused", "78")
    cluster.wait(job, "SPECIAL_EXIT", restarts=1)
    cluster.run("scontrol", "release", job)
    cluster.start_soon(job)
    assert cluster.wait(job, "COMPLETED", "FAILED", restarts=1)["JobState"] == "COMPLETED"


def test_a_signalled_job_goes_back_into_the_queue_and_on(cluster: Cluster, tmp_path: Path) -> None:
    job = ending(cluster, tmp_path / "signalled", "signal")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.start_soon(job)
    assert cluster.wait(job, "COMPLETED", "FAILED", "SPECIAL_EXIT", restarts=1)["JobState"] == "COMPLETED"
    assert "ended with 75: scontrol requeue" in printed(tmp_path / "signalled" / "job.sbatch", job)


def test_a_cancelled_job_stays_cancelled_although_its_ranks_saved(cluster: Cluster, tmp_path: Path) -> None:
    job = ending(cluster, tmp_path / "cancelled", "signal")
    cluster.run("scancel", job)
    facts = cluster.wait(job, "CANCELLED", "PENDING", "COMPLETED", "SPECIAL_EXIT")
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert (tmp_path / "cancelled" / "run" / "exit_status.json").read_text() == '{"code": 75}'


def test_a_job_whose_node_is_lost_starts_again(cluster: Cluster, tmp_path: Path) -> None:
    job = ending(cluster, tmp_path / "lost", "signal")
    cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    cluster.wait(job, "PENDING", restarts=1)
    cluster.bring_back(NODES[1])
    cluster.start_soon(job)
    assert cluster.wait(job, "COMPLETED", "FAILED", "SPECIAL_EXIT", restarts=1)["JobState"] == "COMPLETED"


def held_training(cluster: Cluster, world: World, run: Path) -> tuple[str, Path]:
    """(job, script) of a training on both nodes that has taken ``HELD_AT`` steps and waits for a signal."""
    holding(Path(f"{run} jobs"), "step", str(HELD_AT))
    script = training(world, run)
    job = cluster.submit(script)
    what = f"step {HELD_AT} of {run}"
    until(lambda: {"step": "yes"} if last_step(run) == HELD_AT else {}, what=what, also=lambda: printed(script, job))
    return job, script


def told_to_save(cluster: Cluster, world: World, run: Path) -> tuple[str, int]:
    """(job, step) of a training that was signalled, and waits in the queue after that step."""
    job, script = held_training(cluster, world, run)
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(job, "PENDING", restarts=1)
    assert "ended with 75: scontrol requeue" in printed(script, job)
    saved = last_step(run)
    assert HELD_AT < saved < STEPS
    assert (run / "ckpt" / f"step-{saved:06d}").is_dir()
    return job, saved


def assert_completes(cluster: Cluster, job: str, run: Path, *, nodes: int = 2) -> None:
    """In its second attempt."""
    cluster.start_soon(job)

    def over() -> dict[str, str]:
        facts = cluster.facts(job)
        return facts if facts["JobState"] in ("COMPLETED", "FAILED", "SPECIAL_EXIT") or facts["Restarts"] != "1" else {}

    output = partial(printed, Path(f"{run} jobs") / "job.sbatch", job)
    facts = until(over, what=f"the end of {run}", also=output)
    assert (facts["JobState"], facts["Restarts"], facts["NumNodes"]) == ("COMPLETED", "1", str(nodes)), output()


def ranks(run: Path) -> int:
    """How many saved its newest checkpoint."""
    path, _ = newest(run / "ckpt")
    return int(json.loads((path / "manifest.json").read_text())["facts"]["layout"]["world"]) if path else 0


def test_a_signalled_training_saves_requeues_and_goes_on_bitwise(cluster: Cluster, world: World, trained: Path) -> None:
    run = world.root / "signalled"
    job, _ = told_to_save(cluster, world, run)
    assert_completes(cluster, job, run)
    assert_bitwise(run, trained)


@pytest.mark.long
def test_a_training_whose_node_is_lost_goes_on_bitwise(cluster: Cluster, world: World, trained: Path) -> None:
    run = world.root / "node lost"
    job, _ = held_training(cluster, world, run)
    cluster.lose(NODES[1])
    cluster.wait(job, "PENDING", restarts=1)
    cluster.bring_back(NODES[1])
    assert_completes(cluster, job, run)
    assert_bitwise(run, trained)


@pytest.mark.long
def test_a_requeued_training_goes_on_with_another_number_of_nodes(
    cluster: Cluster, world: World, trained: Path, whole: Path
) -> None:
    run = world.root / "on fewer"
    job, saved = told_to_save(cluster, world, run)
    assert ranks(run) == 2
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1")
    assert_completes(cluster, job, run, nodes=1)
    assert ranks(run) == 1
    assert steps_of(run, "loss")[:saved] == steps_of(trained, "loss")[:saved]
    assert_same_losses(run, whole)
