"""What the two training commands share; apart from compose.py, because DeepSpeed takes seconds to import."""

from __future__ import annotations

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.trainer import DataLimits, Trainer
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.protocols import Task
from launch.compose import RankData, note_data, prepare_folder


def run_training(
    config: DiTRun | VAERun, task: Task, *, data: RankData, mesh: ParallelMesh, new_data: bool = False
) -> None:
    """From the run's folder to its last step."""
    prepare_folder(config, mesh, plan=data.plan, new_data=new_data)
    limits = DataLimits(
        micro_steps=data.loader.micro_steps, tokens_per_pack=config.data.tokens_per_pack,
        max_bad_share=config.data.max_bad_share,
    )  # fmt: skip
    try:
        Trainer(config, task, batches=data, mesh=mesh, data_limits=limits).run()
    finally:
        data.loader.close()
    if mesh.is_first:
        note_data(config, data.plan, drawn=data.plan.seen(config.train.steps))
