"""Train the autoencoder: deepspeed | torchrun | python  launch/train_vae.py --config FILE [key=value ...]"""

from __future__ import annotations

from cogvideo_dist.config.load import load_config
from cogvideo_dist.config.schema import VAERun
from cogvideo_dist.data.loader import check_ranks
from cogvideo_dist.parallel.mesh import ParallelMesh, stop
from cogvideo_dist.tasks.vae import VAETask
from launch.compose import RankData, build_vae, latent_geometry
from launch.environment import config_parser, join, read_place, run_command, split_config
from launch.training import run_training


def main() -> None:
    parser = config_parser(
        "Train the 3D causal autoencoder on whole clips. Started again, it goes on from its last checkpoint.",
        "deepspeed --num_gpus 2 launch/train_vae.py --config configs/demo/vae.yaml",
    )
    config = load_config(VAERun, **split_config(parser.parse_args().config))
    place = read_place()
    check_ranks(config.data.packs_per_step, place.world)
    mesh, _ = join(place)
    train(config, mesh)
    stop()


def train(config: VAERun, mesh: ParallelMesh) -> None:
    """The whole run, on this rank of ``mesh``."""
    data = RankData(config.data, seed=config.run.seed, geometry=latent_geometry, mesh=mesh)
    task = VAETask(build_vae(config), config.loss, seed=config.run.seed, fps=config.data.fps)
    run_training(config, task, data=data, mesh=mesh)


if __name__ == "__main__":
    run_command("train_vae", main)
