"""Job scripts away from a cluster: srun and scontrol are programs here that note how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm import render
from tests.launch.world import CONFIG

SRUN = """\
#!/bin/bash
printf '%s\\0' "$@" > "$RECORDS/srun"
if [[ -n $WAITS ]]; then  # a rank that saves when it is told to
  trap 'echo USR1 >> "$RECORDS/signals"; printf %s "$SAYS" > "$STATUS"; exit 75' USR1
  trap 'echo TERM >> "$RECORDS/signals"' TERM
  touch "$RECORDS/up"
  for _ in {1..600}; do sleep 0.05; done
  exit 1
fi
[[ -z $SAYS ]] || printf %s "$SAYS" > "$STATUS"
exit "${ENDS:-0}"
"""
SCONTROL = """\
#!/bin/bash
printf '%s\\n' "$*" >> "$RECORDS/scontrol"
[[ $* != *show* ]] || echo "JobId=7 JobName=x $FACTS Dependency=(null) Restarts=0"
"""


@dataclass(frozen=True)
class Site:
    """A folder to work in, with a configuration, and a PATH on which Slurm's programs note their calls."""

    root: Path
    config: Path

    def render(self, *arguments: str, folder: Path | None = None, behind: Sequence[str] = ()) -> str:
        options = render.parser().parse_args([*arguments, "--out", str(self.root / "jobs" / "job.sbatch")])
        return render.script(options, behind, folder=folder or self.root)

    def train(self, *more: str) -> str:
        return self.render("--config", str(self.config), *more, "--gpus-per-node", "0", "--time", "60")

    def environment(self, **variables: str) -> dict[str, str]:
        path = os.pathsep.join([str(self.root / "bin"), os.environ["PATH"]])
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return {**clean, "PATH": path, "RECORDS": str(self.root / "records"), "SLURM_JOB_ID": "7", **variables}

    def start(self, text: str, **variables: str) -> subprocess.Popen[str]:
        """The job, as slurmd would start it: a copy in another folder."""
        shutil.rmtree(self.root / "records", ignore_errors=True)
        (self.root / "records").mkdir()
        script = self.root / "spool" / "slurm_script"
        script.parent.mkdir(exist_ok=True)
        script.write_text(text, encoding="utf-8")
        return subprocess.Popen(
            ["bash", str(script)], env=self.environment(**variables), cwd=script.parent, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, text: str, **variables: str) -> int:
        process = self.start(text, **variables)
        assert process.stdout is not None
        print(process.communicate(timeout=60)[0])
        return process.returncode

    def called(self) -> list[str]:
        """srun's arguments."""
        return (self.root / "records" / "srun").read_bytes().decode().split("\0")[:-1]

    def asked(self) -> list[str]:
        """scontrol's commands but its questions."""
        path = self.root / "records" / "scontrol"
        return [line for line in path.read_text().splitlines() if "show" not in line] if path.exists() else []


def make_site(root: Path) -> Site:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    config = root / "tiny.yaml"
    config.write_text(CONFIG.replace("WORLD", str(root)))
    (root / "jobs").mkdir()
    shutil.copy(render.FOLDER / "env.sh", root / "jobs" / "env.sh")
    return Site(root, config)


def directives(text: str) -> list[str]:
    """What sbatch reads: it stops at the first line that is neither empty nor a comment."""
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            return found
        found += [line.removeprefix("#SBATCH ")] if line.startswith("#SBATCH") else []
    return found
