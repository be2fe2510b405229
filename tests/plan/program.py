"""Conversion of a planner's job and choice to a run of the trainer."""

import dataclasses
from pathlib import Path

from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from usp_jax.models.execution import MeshSizes, Staging, with_fields_of
from usp_jax.plan.choice import Choice, Job


def config_of(job: Job, choice: Choice) -> Config:
    """The configuration that trains a job with a choice of the planner."""
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    model = job.model_of(choice)
    return Config(
        model=ModelConfig(**{name: getattr(model, name) for name in names}),
        steps=10,
        sequence_length=job.sequence,
        batch_size=job.batch,
        run_dir=Path("unused"),
        layout=job.layout,
        accumulate=choice.accumulate,
        dtype=job.model.dtype,
        mesh=with_fields_of(MeshConfig(), choice, MeshSizes, Staging),
        optimizer=OptimizerConfig(offload=choice.offload),
    )
