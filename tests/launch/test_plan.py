"""A plan's numbers are those of the real modules: parameters, pieces of every rank, bytes that are sent; and what it recommends
fits and runs as it says."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.zero import Engine
from cogvideo_dist.models.presets import RELEASED
from cogvideo_dist.parallel.mesh import Axis, Layout, ParallelMesh, build_mesh, choose_layout, legal_layouts
from cogvideo_dist.parallel.split import split_of
from launch import plan
from launch.cost import cost_of
from launch.parity_steps import Job, batches, build_task
from launch.plan_cluster import REACHED, Cluster
from launch.plan_cluster import Path as Way
from launch.plan_dry import Run, dry_run, model_of, runs_of, wrong
from launch.plan_layouts import ALIKE, Candidate, Survey, reasons, survey
from launch.plan_report import settings
from launch.plan_scaling import curve
from tests.config.test_shipped import PARAMETERS
from tests.launch.world import outcome
from tests.ranks import run_ranks

FILE = """\
run: {dir: runs/x}
model: {preset: cogvideox-5b}
data: {source: latents, shards: d, sizes: [[49, 480, 720]], fps: 8, tokens_per_pack: 17776, packs_per_step: 16}
train: {steps: 1000, learning_rate: 1.0e-5}
checkpoint: {every: 100}
"""
TINY = (
    "model.layers=2", "model.heads=4", "model.head_dim=16", "model.time_embed_dim=16", "model.text_dim=16",
    "model.text_length=16", "data.sizes=[[5, 64, 64]]", "data.tokens_per_pack=48", "data.packs_per_step=4",
    "train.precision=fp32",
)  # fmt: skip
"""48 tokens and 4 heads, which divide over four ranks."""
NODE = Cluster(1, 8, memory=80e9)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def of(file: Path, *changes: str) -> DiTRun:
    return load_config(DiTRun, [file], overrides=changes)


def candidate(found: Survey, name: str) -> Candidate:
    return next(each for each in found.candidates if each.name == name)


@pytest.mark.parametrize("preset", RELEASED)
def test_parameters_are_those_of_the_released_models(file: Path, preset: str) -> None:
    """On all ranks together, too. The learned positions of 5B-I2V are a buffer in the public model."""
    config = of(file, f"model.preset={preset}", "frozen.vae=v")
    expected = PARAMETERS[preset] + 17_776 * 3072 * RELEASED[preset].learned_positions
    found = survey(config, replace(NODE, gpus_per_node=1), offloading=False)
    assert found.candidates[0].share.parameters == expected
    dry = dry_run(config, Layout(dp=3, tp=2), stage=3)
    assert dry.parameters == dry.trained == expected
    assert not dry.problems


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_pieces_of_1024_ranks_are_the_model(file: Path, stage: int) -> None:
    """Once, and once more for every other rank of tp what these hold alike; under stage 0 on every replica."""
    config = of(file, *TINY)
    dry = dry_run(config, Layout(dp=128, ulysses=4, tp=2), stage=stage)
    model = model_of(config, Axis("tp", 0, 2, (0, 1)))
    alike = sum(p.numel() for name, p in model.named_parameters() if split_of(model, name) is None)
    assert not dry.problems
    assert sum(dry.updated) == (dry.parameters + alike) * (512 if stage == 0 else 1)
    assert (dry.held == dry.updated) == (stage in (0, 3))


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_are_divided_and_the_rest_is_held(file: Path, stage: int) -> None:
    config = of(file, *TINY, "lora={rank: 4}")
    dry = dry_run(config, Layout(dp=4), stage=stage)
    assert dry.trained == sum(dry.updated) == cost_of(config, 1).share.adapters
    assert min(dry.held) >= dry.parameters // (4 if stage == 3 else 1)
    assert max(dry.held) <= dry.parameters / (3.9 if stage == 3 else 1)


def held(mesh: ParallelMesh, config: DiTRun, layout: Layout) -> list[dict[str, list[int]]]:
    """What DeepSpeed gives this rank's optimizer under stages 1, 2 and 3: parameter -> [start, stop)."""
    mesh = build_mesh(layout, rank=mesh.world.rank)
    return [held_under(mesh, config, stage) for stage in (1, 2, 3)]


def held_under(mesh: ParallelMesh, config: DiTRun, stage: Any) -> dict[str, list[int]]:
    job = Job(config, Layout(), (), (), 1, "cpu")
    task = build_task(job, mesh, device=torch.device("cpu"), dtype=torch.float32)
    engine = Engine(task.model, replace(config.train, zero_stage=stage), mesh=mesh, micro_steps=1)
    return {name: [piece.start, piece.stop] for name, piece in engine.held().items() if piece.count}


def test_pieces_are_those_of_deepspeed(file: Path) -> None:
    """Of a model with parameters that do not divide over the ranks."""
    config, layout = of(file, *TINY, "model.heads=6", "model.text_dim=17"), Layout(dp=2, tp=2)
    for rank, stages in enumerate(run_ranks(held, 4, config, layout)):
        model = model_of(config, Axis("tp", rank % 2, 2, (0, 1)))
        for stage, found in zip((1, 2, 3), stages):
            runs = runs_of(model, replicas=2, stage=stage)
            mine = {
                name: [start, stop]
                for name, each in runs.items()
                for replica, start, stop in each
                if replica == rank // 2 and start < stop
            }
            assert found == mine, (stage, rank)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 0, 4), (1, 5, 10)], "elements 4 to 5 of x are with no rank or with two"),
        ([(0, 0, 6), (1, 5, 10)], "elements 5 to 6 of x are with no rank or with two"),
        ([(0, 0, 4), (1, 4, 9)], "ranks have 9 of the 10 elements of x"),
        ([(0, 0, 4), (1, 4, 10)], None),
    ],
)
def test_pieces_that_are_not_the_whole_are_told(runs: list[Run], message: str | None) -> None:
    assert wrong(runs, 10, copies=1, of="of x") == message


def sent(mesh: ParallelMesh, config: DiTRun, layouts: list[Layout]) -> list[dict[str, int]]:
    return [sent_in(mesh.world.rank, config, layout) for layout in layouts]


def sent_in(rank: int, config: DiTRun, layout: Layout) -> dict[str, int]:
    """Bytes of a whole step of the real task, as the ledger counts them."""
    mesh = build_mesh(layout, rank=rank)
    task = build_task(Job(config, layout, (), (), 1, "cpu"), mesh, device=torch.device("cpu"), dtype=torch.float32)
    packs = ((config.data.sizes[0],),) * config.data.packs_per_step
    for batch in batches(config, 0, packs=packs, dp=mesh.dp):
        task.loss(task.model, batch).total.backward()
    return {" ".join(key): traffic.bytes for key, traffic in mesh.ledger.take().items()}


@pytest.mark.parametrize("recompute", ["none", "all_but_attention"])
def test_volumes_are_those_of_the_ledger(file: Path, recompute: str) -> None:
    """All of them; what DeepSpeed sends is not in the ledger."""
    config = of(file, *TINY, f"train.recompute={recompute}", "train.zero_stage=2")
    layouts = [layout for layout in legal_layouts(4, heads=4) if layout.sample > 1]
    found, ranks = survey(config, replace(NODE, gpus_per_node=4)), run_ranks(sent, 4, config, layouts)
    assert len(layouts) > 6
    for number, layout in enumerate(layouts):
        switches = "" if recompute == "none" else f", recompute {recompute}"
        volumes = candidate(found, f"{layout.name}, ZeRO 2{switches}").volumes
        for (axis, operation), value in volumes.items():
            counted = sum(rank[number].get(f"{axis} {operation}", 0) for rank in ranks) / 4
            if axis != "replica":
                assert counted == pytest.approx(value, rel=1e-12), (layout.name, axis, operation)


def test_zero_sends_gradients_to_owners_and_weights_to_everyone(file: Path) -> None:
    found, whole = survey(of(file), NODE), 2 * 5_570_283_072 * 7 / 8
    for stage, reduced, gathered in ((1, 1, 1), (2, 2, 1), (3, 2, 4)):  # two packs for each GPU
        volumes = candidate(found, f"dp8, ZeRO {stage}").volumes
        assert volumes == {("replica", "reduce"): reduced * whole, ("replica", "gather"): gathered * whole}


def test_a_plan_and_a_cost_are_of_one_model(file: Path) -> None:
    """The same memory and the same work; only what is sent goes over the links of a cluster."""
    config = of(file, "parallel.sp=2", "parallel.tp=2", "train.recompute=feed_forward")
    cost, planned = (
        cost_of(config, 8),
        candidate(survey(config, NODE), "dp2-ulysses2-tp2, ZeRO 2, recompute feed_forward"),
    )
    assert planned.memory == cost.memory
    assert replace(planned.seconds, sent=0) == replace(cost.seconds, sent=0)
    assert planned.flops == cost.flops


def test_links_are_those_that_an_axis_lies_on() -> None:
    cluster = Cluster(4, 8, memory=80e9)
    layout = Layout(dp=2, ring=2, ulysses=4, tp=2)
    paths = {axis: cluster.path(layout, axis) for axis in ("tp", "ulysses", "ring", "replica")}
    assert paths == {"tp": Way(2, 1, 2), "ulysses": Way(4, 1, 4), "ring": Way(2, 2, 1), "replica": Way(16, 4, 4)}
    scattered = replace(cluster, gpus_per_node=6, nodes=6).path(Layout(dp=9, ulysses=4), "ulysses")
    assert scattered == Way(4, 2, 2)  # ranks 4 to 7 lie in two nodes of six


def test_seconds_follow_from_the_slowest_link() -> None:
    cluster = Cluster(2, 8, memory=80e9, link=400e9, network=50e9)
    inside, outside, wide = Way(8, 1, 8), Way(16, 2, 8), Way(2, 2, 1)
    assert cluster.seconds(inside, "shift", sent=1e9) == pytest.approx(1 / (REACHED * 400))
    assert cluster.seconds(outside, "gather", sent=1e9) == pytest.approx(1 / (REACHED * 400))  # by eight cards of 50
    assert cluster.seconds(wide, "gather", sent=1e9) == pytest.approx(1 / (REACHED * 50))
    assert cluster.seconds(outside, "shift", sent=1e9) == pytest.approx(1 / (REACHED * 50))
    assert cluster.seconds(outside, "all_to_all", sent=15e9) == pytest.approx(8 / (REACHED * 50))


def test_a_ring_hides_behind_attention_where_its_links_are_fast(file: Path) -> None:
    near = candidate(survey(of(file), NODE), "dp4-ring2, ZeRO 2")
    far = candidate(survey(of(file), Cluster(8, 1, memory=80e9, network=1e9)), "dp4-ring2, ZeRO 2")
    ring = ("ring", "shift")
    assert near.seconds.sent == pytest.approx(sum(near.travel.values()) - near.travel[ring])
    assert 0 < sum(far.travel.values()) - far.seconds.sent < far.travel[ring]


def test_what_is_recommended_fits_and_nothing_that_fits_is_much_faster(file: Path) -> None:
    found = survey(of(file), NODE)
    chosen = found.recommended
    assert chosen is not None and chosen.memory.peak <= 72e9 and chosen.host <= 0.9 * 1e12 / 8
    for other in found.candidates:
        fits = other.memory.peak <= 72e9 and other.host <= 0.9 * 1e12 / 8
        assert fits == (other.over(NODE) <= 0) == (not other.lack(NODE))
        if fits:
            assert chosen.step <= ALIKE * other.step
        if fits and other.step <= chosen.step:
            assert chosen.switches <= other.switches
    assert len({each.name for each in found.candidates}) == len(found.candidates)


def test_what_does_not_fit_says_by_how_much(file: Path) -> None:
    small = replace(NODE, memory=50e9)
    found = survey(of(file), small)
    other = candidate(found, "dp8, ZeRO 1")
    assert other.lack(small) == f"{(other.memory.peak - 45e9) / 1e9:.1f} GB too many"
    offloaded = candidate(survey(of(file), replace(small, host_memory=1e11)), "dp8, ZeRO 1, offload activations")
    assert offloaded.host == pytest.approx(20 * 17776 * 3072 * 42)
    assert offloaded.lack(replace(small, memory=2e11, host_memory=1e11)) == "34.6 GB of the host too many"
    assert found.recommended is not None
    assert any(line.endswith("GB too many") for line in reasons(found, found.recommended))


def test_layouts_that_cannot_run_say_why(file: Path) -> None:
    found = survey(of(file, "data.packs_per_step=4", "parallel.attention=varlen"), NODE)
    assert {refusal.why for refusal in found.refusals} == {
        "data.packs_per_step 4 does not divide over 8 data-parallel ranks",
        "parallel.attention varlen has no backward for parts of a clip, which a ring needs",
    }
    assert {each.layout.dp for each in found.candidates} == {1, 2, 4}
    assert {each.layout.ring for each in found.candidates} == {1}


def test_the_settings_make_the_run_that_was_planned(file: Path) -> None:
    cluster = Cluster(2, 8, memory=40e9)
    chosen = survey(of(file), cluster).recommended
    assert chosen is not None
    config = of(file, *settings(chosen))
    assert choose_layout(config.parallel, world=16, heads=48, node=8) == chosen.layout
    assert cost_of(config, 16).memory == chosen.memory


@pytest.mark.parametrize("strong", [True, False])
def test_scaling_reaches_1024_gpus(file: Path, strong: bool) -> None:
    found = curve(of(file), NODE, strong=strong)
    assert [point.gpus for point in found.points] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert [point.packs for point in found.points] == [16 if strong else 2 * point.gpus for point in found.points]
    steps = [point.best.step for point in found.points if point.best]
    assert len(steps) == len(found.points)
    efficiencies = [found.efficiency(point) for point in found.points]
    assert efficiencies[0] == 1
    if strong:
        assert sorted(steps, reverse=True) == steps
        assert efficiencies[-1] < 0.8 * efficiencies[0]  # 64 ranks to a pack send more than they compute
    else:
        assert max(steps) < 1.1 * min(steps)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["plan.py", "--config", *arguments])
    return outcome("plan", plan.main)


CLUSTER = ("--nodes", "2", "--gpus-per-node", "2")


def test_the_command_writes_a_table_a_file_and_a_figure(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = file.parent / "out"
    arguments = (str(file), *TINY, *CLUSTER, "--memory", "16", "--dry-run", "--out", str(out))
    code, stdout, stderr = run(monkeypatch, *arguments)
    assert code == 0, stderr
    data = json.loads((out / "plan.json").read_text())
    best = data["recommended"]
    assert f"recommended: {best['name']}" in stdout
    assert "the ranks' pieces are the whole model" in stdout
    assert data["cluster"]["gpus"] == len(data["dry_run"]["held"]) == 4
    assert data["parameters"] == data["dry_run"]["parameters"]
    assert {each["layout"]["dp"] for each in data["layouts"]} == {1, 2, 4}
    assert best["memory"]["peak"] == sum(best["memory"]["at_peak"].values())
    assert best["fits"] and best["name"] in {each[0] for each in data["candidates"]}
    assert [point["gpus"] for point in data["scaling"]["strong"]][-1] == 1024
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_cluster_that_is_too_small_is_told(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = file.parent / "out"
    code, stdout, _ = run(monkeypatch, str(file), *TINY, *CLUSTER, "--memory", "0.0001", "--out", str(out))
    assert code == 1
    assert "nothing fits; the smallest, " in stdout and "GB too many" in stdout
    assert json.loads((out / "plan.json").read_text())["recommended"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--nodes", "0", "--gpus-per-node", "8", "--memory", "80"), "--nodes must be above 0, found 0"),
        (("--nodes", "1", "--gpus-per-node", "-8", "--memory", "80"), "--gpus-per-node must be above 0, found -8"),
        ((*CLUSTER, "--memory", "nan"), "--memory must be above 0, found nan"),
        ((*CLUSTER, "--memory", "80", "--link", "0"), "--link must be above 0, found 0"),
        ((*CLUSTER, "--memory", "80", "--network", "inf"), "--network must be above 0, found inf"),
        ((*CLUSTER, "--memory", "80", "--host-memory", "-1"), "--host-memory must be above 0, found -1"),
        (("data.tokens_per_pack=9", *CLUSTER, "--memory", "80"), "data.tokens_per_pack 9 holds none of data.sizes"),
        (("model.heads=1", "data.packs_per_step=1", "parallel.attention=varlen", *CLUSTER, "--memory", "80"),
         "no layout of 4 GPUs: data.packs_per_step 1 does not divide over 4 data-parallel ranks; "),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = run(monkeypatch, str(file), *changes)
    assert code != 0 and not stdout
    assert stderr.startswith(f"plan: error: {message}")
    assert len(stderr.splitlines()) == 1
