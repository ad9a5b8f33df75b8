"""Train the diffusion transformer: deepspeed | torchrun | python  launch/train_dit.py --config FILE [key=value ...]"""

from __future__ import annotations

if __name__ == "__main__":
    from launch.supervise import supervise

    supervise()  # what follows takes seconds to import, and is for the rank alone

from dataclasses import asdict, replace

import torch

from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.data.loader import check_ranks
from cogvideo_dist.pack.attention import backend_for
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, Place, choose_layout, stop
from cogvideo_dist.tasks.video import Adapting, Sharding, VideoTask
from launch.alike import alike
from launch.beginning import begin
from launch.compose import RankData, TransformerGeometry, load_frozen
from launch.environment import device_of, join, run_command, split_config, training_parser
from launch.pulse import pulse_of_process
from launch.training import Start, run_training, start_of, watched_place


def main() -> None:
    parser = training_parser(
        "Train the diffusion transformer, from pixels or from precomputed latents. Started again, it goes on from its last "
        "checkpoint.",
        "deepspeed --num_gpus 2 launch/train_dit.py --config configs/demo/dit.yaml train.steps=20",
    )
    options = parser.parse_args()
    config = load_config(DiTRun, **split_config(options.config))
    place = watched_place(config, replays=options.replay is not None)
    mesh, device = join(place, layout_of(config, place), facts=alike(config))
    pulse_of_process().mark("build")
    train(config, mesh, device=device, start=start_of(options))
    stop()


def layout_of(config: DiTRun, place: Place) -> Layout:
    """Which ranks do what; refuses what cannot run before anything starts."""
    layout = choose_layout(config.parallel, world=place.world, heads=config.model.transformer().heads, node=place.node)
    check_ranks(config.data.packs_per_step, layout.dp)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.train.precision]
    backend_for(config.parallel.attention, device=device_of(place), dtype=dtype, ring=layout.ring)
    return layout


def train(config: DiTRun, mesh: ParallelMesh, *, device: torch.device, start: Start = Start()) -> None:  # noqa: B008 (frozen)
    """The whole run, on this rank of ``mesh``."""
    data = RankData(
        config.data, run=config.run, geometry=TransformerGeometry(config.model.transformer()), mesh=mesh,
        writes=start.replay is None,
    )  # fmt: skip
    frozen = load_frozen(config, device=device, records=data.records, pictures=config.validation.samples_every > 0)
    begun = begin(config, mesh, before=start.replay)
    adapters = None if config.lora is None else Adapting(asdict(config.lora), begun.base)
    task = VideoTask(
        begun.model, frozen, diffusion=config.diffusion, validation=config.validation, seed=config.run.seed,
        sharding=Sharding(mesh, config.parallel.attention), adapting=adapters,
    )  # fmt: skip
    run_training(config, task, data=data, mesh=mesh, start=replace(start, lineage=begun.lineage))


if __name__ == "__main__":
    run_command("train_dit", main)
