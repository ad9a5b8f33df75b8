"""A run whose shards are on a web server or in S3 is the run on a folder; a server that fails ends it and loses nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import boto3
import pytest
import torch

from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.parallel.mesh import ParallelMesh
from launch import train_dit
from launch.environment import REFUSED, TRANSIENT
from launch.training import Start
from tests.data.clips import make_clip
from tests.data.clips import make_shards as make_set
from tests.data.servers import s3_server, web_server
from tests.launch.world import World, read_log, train, try_train
from tests.ranks import run_ranks

KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}


def train_with(mesh: ParallelMesh, file: Path, overrides: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    train(mesh, file, overrides)


def losses(run: Path) -> list[tuple[float, ...]]:
    return [(entry["step"], entry["loss"], entry["gradient_norm"]) for entry in read_log(run) if "loss" in entry]


@pytest.fixture(scope="module")
def local(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, ...]]:
    run = tmp_path_factory.mktemp("local") / "run"
    run_ranks(train, 1, world.file, world.overrides(run, "train.steps=3"))
    return losses(run)


def shards(world: World) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (world.root / "shards").iterdir()}


def test_from_a_web_server_whose_connections_break(
    world: World, tmp_path: Path, local: list[tuple[float, ...]]
) -> None:
    with web_server() as server:
        server.files = {f"/data/{name}": content for name, content in shards(world).items()}
        server.faults.extend(["cut", "error", "short"])
        remote = (f"data.shards={server.url}/data", f"data.remote.cache={tmp_path / 'cache'}", "data.workers=1")
        run_ranks(train, 1, world.file, world.overrides(tmp_path / "run", "train.steps=3", *remote))
        assert not server.faults
    assert losses(tmp_path / "run") == local


@pytest.mark.parametrize("whole", [False, True])
def test_from_s3(world: World, tmp_path: Path, local: list[tuple[float, ...]], whole: bool) -> None:
    with s3_server() as address:
        client = boto3.client(
            "s3", endpoint_url=address, aws_access_key_id="k", aws_secret_access_key="s", region_name="us-east-1"
        )
        client.create_bucket(Bucket="videos")
        for name, content in shards(world).items():
            client.put_object(Bucket="videos", Key=f"set/{name}", Body=content)
        remote = (
            "data.shards=s3://videos/set", f"data.remote.cache={tmp_path / 'cache'}", f"data.remote.whole_shards={whole}",
        )  # fmt: skip
        overrides = world.overrides(tmp_path / "run", "train.steps=3", *remote)
        run_ranks(train_with, 1, world.file, overrides, {**KEYS, "AWS_ENDPOINT_URL": address})
    assert losses(tmp_path / "run") == local


def test_a_server_that_stays_broken_ends_the_run_with_a_line(world: World, tmp_path: Path) -> None:
    with web_server() as server:
        server.files = {f"/data/{name}": content for name, content in shards(world).items()}
        tar = next(name for name in server.files if name.endswith(".tar"))
        del server.files[tar]
        remote = (f"data.shards={server.url}/data", f"data.remote.cache={tmp_path / 'cache'}", "data.remote.retries=1")
        ((code, _, stderr),) = run_ranks(try_train, 1, world.file, world.overrides(tmp_path / "run", *remote))
    assert code == 1
    (line,) = [line for line in stderr.splitlines() if line.startswith("train_dit: error: ")]
    assert Path(tar).name in line
    assert not read_log(tmp_path / "run") or all("loss" not in entry for entry in read_log(tmp_path / "run"))


def test_a_server_that_never_answers_is_no_fault_of_the_run(world: World, tmp_path: Path) -> None:
    with web_server() as server:
        server.files = {f"/data/{name}": content for name, content in shards(world).items()}
        remote = (f"data.shards={server.url}/data", f"data.remote.cache={tmp_path / 'cache'}", "data.remote.retries=0")
        index = run_ranks(try_train, 1, world.file, world.overrides(tmp_path / "run", "train.steps=3", *remote))
        assert index[0][0] == 0
        server.always = "cut"
        ((code, _, stderr),) = run_ranks(
            try_train, 1, world.file, world.overrides(tmp_path / "run", "train.steps=4", *remote)
        )
    assert code == TRANSIENT
    assert "failed, try 1 of 1" in stderr


def train_on_new_data(mesh: ParallelMesh, file: Path, overrides: list[str]) -> None:
    train_dit.train(
        load_config(DiTRun, [file], overrides=overrides), mesh, device=torch.device("cpu"), start=Start(new_data=True)
    )


def test_a_changed_set_is_refused_until_it_is_allowed(world: World, tmp_path: Path) -> None:
    """Continued on other shards, the same steps would have other clips."""
    folder = tmp_path / "shards"
    shutil.copytree(world.root / "shards", folder)
    first = world.overrides(tmp_path / "run", f"data.shards={folder}", "train.steps=2", "checkpoint.every=2")
    run_ranks(train, 1, world.file, first)
    (source,) = json.loads((tmp_path / "run" / "data.json").read_text())
    assert source["drawn"] >= 2
    shutil.rmtree(folder)
    make_set(tmp_path, [(f"videos/{i}.mp4", make_clip(12, 8, size=(48, 64))) for i in range(9)])
    more = [*first, "train.steps=4"]
    ((code, _, stderr),) = run_ranks(try_train, 1, world.file, more)
    assert code == REFUSED
    assert "is not what the run began with" in stderr
    assert "pass --new-data to go on with other clips from here" in " ".join(stderr.split())
    run_ranks(train_on_new_data, 1, world.file, more)
    assert [step for step, *_ in losses(tmp_path / "run")][-1] == 4
    run_ranks(train, 1, world.file, [*more, "train.steps=5"])
