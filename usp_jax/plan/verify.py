"""What the compiler says of a choice: the training step, compiled for the machine.

The step is that of `train`: loss, gradient, clipping by the norm, AdamW. Needs flax
and the compilers, `pip install 'usp_jax[plan,aot]'`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

import usp_jax
from usp_jax import aot
from usp_jax.models.accumulate import summed
from usp_jax.models.llama import Llama
from usp_jax.models.loss import loss
from usp_jax.models.sharding import TABLE, parameter_shardings
from usp_jax.plan.choice import Choice, Job, lacks


def compile_step(job: Job, choice: Choice) -> aot.Report:
    """The report on a step's program.

    Raises:
      ValueError: the machine has no compiler, or the training program lacks the choice.
      ImportError: the compiler is not installed.
    """
    if lacking := lacks(choice):
        raise ValueError(f"{choice} is not in the trainer: it lacks {lacking}")
    topology = aot.topology(job.machine.topology(job.devices))
    mesh = usp_jax.make_mesh(devices=topology.devices, **choice.sizes)  # type: ignore[arg-type]
    step, shapes = training_step(job, choice, mesh)
    options = usp_jax.recommended_flags(topology.platform)
    return aot.compile(step, *shapes, compiler_options=options)


def training_step(job: Job, choice: Choice, mesh: Mesh) -> Any:
    """The jitted step, and its arguments as shapes with their shardings."""
    config = job.model_of(choice)
    model = nnx.eval_shape(lambda: Llama(config, mesh=mesh, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(model)
    shardings = parameter_shardings(config, mesh)
    if choice.offload:
        shardings = {
            name: sharding.with_memory_kind("pinned_host")
            for name, sharding in shardings.items()
        }
    params = {  # type: ignore[assignment]
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
        for name, x in nnx.to_pure_dict(params).items()
    }
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, jax.P()))
    state = (count, (params, params, params))
    out = jax.tree.map(lambda x: x.sharding, state)
    spec = NamedSharding(mesh, model.split.tokens)
    ids = jax.ShapeDtypeStruct((job.batch, job.sequence), jnp.int32, sharding=spec)
    step = partial(_step, graphdef, job.layout, choice)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(out, None))
    return jitted, (state, dict.fromkeys(("tokens", "labels", "segment_ids"), ids))


def _step(graphdef: Any, layout: Any, choice: Choice, state: Any, batch: Any) -> Any:
    """(count, (parameters, moments, second moments)), batch -> the same after, loss."""
    count, kept = state

    def nats_of(params: Any, part: Any) -> Any:
        return loss(
            nnx.merge(graphdef, params),
            part["tokens"],
            part["labels"],
            segment_ids=part["segment_ids"],
            layout=layout,
        )

    params = _moved(kept[0], "Device") if choice.offload else kept[0]
    pull = jax.value_and_grad(nats_of, has_aux=True)
    (value, labels), gradient = summed(pull, choice.accumulate, params, batch)
    scale = 1 / jnp.maximum(labels, 1)
    value, gradient = jax.tree.map(lambda x: x * scale, (value, gradient))
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in gradient.values()))
    gradient = {name: g / jnp.maximum(norm, 1) for name, g in gradient.items()}
    count += 1
    update = _streamed if choice.offload else _adamw
    return (count, update(count, gradient, kept)), (value, norm)


def _adamw(count: Any, gradient: Any, kept: Any) -> Any:
    """(parameters, moments, second moments) after a step."""
    params, mu, nu = kept
    mu = {name: 0.9 * mu[name] + 0.1 * g for name, g in gradient.items()}
    nu = {name: 0.95 * nu[name] + 0.05 * g * g for name, g in gradient.items()}
    unbias = [1 - rate ** count.astype(jnp.float32) for rate in (0.9, 0.95)]

    def moved(name: Any, x: Any) -> Any:
        direction = mu[name] / unbias[0] / (jnp.sqrt(nu[name] / unbias[1]) + 1e-8)
        return x - 1e-4 * (direction + 0.1 * x)

    return {name: moved(name, x) for name, x in params.items()}, mu, nu


def _streamed(count: Any, gradient: Any, kept: Any) -> Any:
    """`_adamw` of what is in the host's memory, one layer after the other."""

    def update(_: Any, own: Any) -> Any:
        gradient, kept = own
        return None, _moved(_adamw(count, gradient, _moved(kept, "Device")), "Host")

    def of(names: Any) -> Any:
        return [{name: x[name] for name in names} for x in (gradient, *kept)]

    layers = [name for name in gradient if TABLE[name][0][0] == "L"]
    first, *others = of(layers)
    _, new = lax.scan(update, None, (first, tuple(others)))
    first, *others = of([name for name in gradient if name not in layers])
    _, rest = update(None, (first, tuple(others)))
    return tuple(a | b for a, b in zip(new, rest, strict=True))


def _moved(tree: Any, where: Any) -> Any:
    """Arrays in the "Device"'s memory, or the "Host"'s."""
    return jax.device_put(tree, jax.memory.Space[where])
