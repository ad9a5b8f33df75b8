"""What the two training commands share; apart from compose.py, because DeepSpeed takes seconds to import."""

from __future__ import annotations

import json
from pathlib import Path

from cogvideo_dist.config.autoencoder import VAERun
from cogvideo_dist.config.schema import DiTRun
from cogvideo_dist.engine.lineage import FILE, Lineage
from cogvideo_dist.engine.trainer import DataLimits, Trainer
from cogvideo_dist.evaluation.media import replacing
from cogvideo_dist.parallel.mesh import ParallelMesh
from cogvideo_dist.protocols import Task
from launch.compose import RankData, note_data, prepare_folder


def run_training(
    config: DiTRun | VAERun, task: Task, *, data: RankData, mesh: ParallelMesh, new_data: bool = False,
    lineage: Lineage | None = None,
) -> None:  # fmt: skip
    """From the run's folder to its last step; ``lineage``: the stages before it."""
    prepare_folder(config, mesh, plan=data.plan, new_data=new_data)
    if mesh.is_first and lineage is not None:
        with replacing(Path(config.run.dir) / FILE) as temporary:
            temporary.write_text(json.dumps(lineage.plain(), indent=1), encoding="utf-8")
    limits = DataLimits(
        micro_steps=data.loader.micro_steps, tokens_per_pack=config.data.tokens_per_pack,
        max_bad_share=config.data.max_bad_share,
    )  # fmt: skip
    try:
        Trainer(config, task, batches=data, mesh=mesh, data_limits=limits, lineage=lineage).run()
    finally:
        data.loader.close()
    if mesh.is_first:
        note_data(config, data.plan, drawn=data.plan.seen(config.train.steps))
