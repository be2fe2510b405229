"""The trainer's step, compiled for devices that need not be here."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import usp_jax
from train.config import Config, MeshConfig, ModelConfig
from train.data import describe
from train.state import State, learning_rate, make_optimizer
from train.step import make_step
from usp_jax.mesh import ROLES
from usp_jax.models.llama import Llama
from usp_jax.models.sharding import parameter_shardings
from usp_jax.plan.choice import Choice, Job


def lowered_step(config: Config, devices: Sequence[jax.Device] | None = None):
    """(jitted step, its arguments as shapes): what `train.loop` compiles, unmade."""
    sizes = {role: getattr(config.mesh, role) for role in ROLES}
    mesh = usp_jax.make_mesh(devices=devices, **sizes)
    optimizer = make_optimizer(config.optimizer, config.steps)
    model = nnx.eval_shape(lambda: Llama(config.llama, mesh=mesh, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    shardings = parameter_shardings(config.llama, mesh)
    replicated = jax.NamedSharding(mesh, jax.P())
    params = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in nnx.to_pure_dict(params).items()
    }
    memory = jax.eval_shape(optimizer.init, params)

    def same(path, x):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if names:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[names[-1]])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated)

    memory = jax.tree_util.tree_map_with_path(same, memory)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    state = State(count, params, memory)
    schedule = learning_rate(config.optimizer, config.steps)
    step = make_step(graphdef, optimizer, schedule, config.layout, config.accumulate)
    out = jax.tree.map(lambda x: x.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(out, None))
    return jitted, (state, describe(config.batch_size, config.sequence_length, mesh))


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
            }
        ),
        steps=10,
        sequence_length=job.sequence,
        batch_size=job.batch,
        run_dir=Path("unused"),
        layout=job.layout,
        accumulate=choice.accumulate,
        dtype=job.model.dtype,
        mesh=MeshConfig(**choice.sizes, zero=choice.zero),
    )
