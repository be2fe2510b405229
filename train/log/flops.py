"""FLOPs of a run's training step, counted in three ways: see `usp_jax.plan.flops`."""

import dataclasses

from train.config import Config
from usp_jax.plan.flops import step_work


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step, forward and backward, over all devices."""

    causal: float
    full: float
    hardware: float


def step_flops(config: Config) -> StepFlops:
    """Evaluates the formulas of `usp_jax.plan.flops` for a run."""
    mesh, tokens = config.mesh, config.batch_size * config.sequence_length
    split = mesh.data * mesh.fsdp * mesh.ring * mesh.ulysses
    parts = config.accumulate * config.pipeline.microbatches
    model, at_once = config.llama, tokens // (split * parts)
    work = step_work(
        model,
        sequence=config.sequence_length,
        batch=config.batch_size,
        tiled=model.mlp_tile is not None and at_once > model.mlp_tile,
        ring=mesh.ring,
    )
    counts = work.causal, work.full, work.hardware
    if config.dpo.beta is None:
        return StepFlops(*map(float, counts))
    # DPO's reference is one more forward pass.
    again = work.layers + work.output + work.attention
    more = again, again + work.masked, again
    return StepFlops(*(float(x + y) for x, y in zip(counts, more, strict=True)))
