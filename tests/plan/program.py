"""A job and a choice of the planner as a run of the trainer."""

import dataclasses
from pathlib import Path

from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from usp_jax.plan.choice import Choice, Job


def config_of(job: Job, choice: Choice) -> Config:
    """The run that trains a job in the way of a choice."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    model = {n: x for n, x in vars(job.model).items() if n in names}
    return Config(
        model=ModelConfig(
            **{
                **model,
                "remat": choice.remat,
                "tensor_sequence": choice.tensor_sequence,
                "mlp_tile": choice.mlp_tile,
            }
        ),
        steps=10,
        sequence_length=job.sequence,
        batch_size=job.batch,
        run_dir=Path("unused"),
        layout=job.layout,
        accumulate=choice.accumulate,
        dtype=job.model.dtype,
        mesh=MeshConfig(
            **choice.sizes,
            zero=choice.zero,
            microbatches=choice.microbatches,
            interleave=choice.interleave,
        ),
        optimizer=OptimizerConfig(offload=choice.offload),
    )
