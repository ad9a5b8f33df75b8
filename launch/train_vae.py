"""Train the autoencoder: deepspeed | torchrun | python  launch/train_vae.py --config FILE [key=value ...]"""

from __future__ import annotations

if __name__ == "__main__":
    from launch.supervise import supervise

    supervise()  # what follows takes seconds to import, and is for the rank alone

import torch

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.load import ConfigError, load_config
from cogvideo_dist.data.loader import check_ranks
from cogvideo_dist.models.perceptual import RANDOM
from cogvideo_dist.parallel.mesh import Layout, ParallelMesh, divisors, stop
from cogvideo_dist.tasks.vae import VAETask
from launch.alike import alike
from launch.autoencoder import build_judges, build_vae
from launch.compose import LatentGeometry, RankData
from launch.environment import join, run_command, split_config, training_parser
from launch.pulse import pulse_of_process
from launch.training import Start, run_training, start_of, watched_place


def main() -> None:
    parser = training_parser(
        "Train the 3D causal autoencoder on whole clips. Started again, it goes on from its last checkpoint.",
        "deepspeed --num_gpus 2 launch/train_vae.py --config configs/demo/vae.yaml",
    )
    options = parser.parse_args()
    config = load_config(VAERun, **split_config(options.config))
    place = watched_place(config, replays=options.replay is not None)
    mesh, device = join(place, layout_of(config, place.world), facts=alike(config))
    pulse_of_process().mark("build")
    train(config, mesh, device=device, start=start_of(options))
    stop()


def layout_of(config: VAERun, world: int) -> Layout:
    """Ranks over (dp, cp); refuses numbers that do not divide."""
    cp = config.parallel.cp
    if world % cp:
        uses = ", ".join(map(str, divisors(world)))
        raise ConfigError(f"parallel.cp {cp} does not divide {world} ranks; use one of {uses}")
    check_ranks(config.data.packs_per_step, world // cp)
    return Layout(dp=world // cp, ulysses=cp, cp=cp)  # of a sample's ranks only cp has work here


def train(config: VAERun, mesh: ParallelMesh, *, device: torch.device, start: Start = Start()) -> None:  # noqa: B008 (frozen)
    """The whole run, on this rank of ``mesh``."""
    data = RankData(config.data, run=config.run, geometry=LatentGeometry(), mesh=mesh, writes=start.replay is None)
    judges = build_judges(config.loss, seed=config.run.seed, device=device)
    if mesh.is_first and config.loss.perceptual is not None and config.loss.perceptual.weights == RANDOM:
        print(
            "warning: loss.perceptual.weights is random: LPIPS over an untrained network, which is for trying things out"
        )
    task = VAETask(build_vae(config), config.loss, seed=config.run.seed, fps=config.data.fps, cp=mesh.cp, judges=judges)
    run_training(config, task, data=data, mesh=mesh, start=start)


if __name__ == "__main__":
    run_command("train_vae", main)
