"""The lines that a run prints before its first step."""

import math

from jax.sharding import Mesh

from train.config import CONTINUED_LEARNING_RATE, LORA_LEARNING_RATE, Config
from train.words import counted
from usp_jax.models.parameters import adaptable_of, parameter_shapes, trained


def banner(config: Config, mesh: Mesh) -> str:
    """Describes the model, mesh, data, work of a step and run directory, in lines."""
    model, device = config.llama, mesh.devices.flat[0]
    axes = [f"{name}={size}" for name, size in mesh.shape.items() if size > 1]
    tokens = config.batch_size * config.sequence_length
    data = "passkeys" if config.passkey.enabled else _source(config)
    return (
        f"model: {_count(model.num_parameters)} parameters, {model.num_layers} layers, "
        f"{config.dtype}\n"
        f"{_adapters(config)}"
        f"{_preferences(config)}"
        f"mesh: {mesh.devices.size} x {device.device_kind} as "
        f"{' x '.join(axes) or 'one device'}, ZeRO-{config.mesh.zero}\n"
        f"data: {data}\n"
        f"step: {counted(config.batch_size, 'row')} of "
        f"{counted(config.sequence_length, 'token')} = "
        f"{tokens:,} tokens, stored {config.layout}\n"
        f"run: {config.steps} steps{_start(config)}, in {config.run_dir}"
    )


def _start(config: Config) -> str:
    """Describes how a run starts, unless its weights are random."""
    if config.init_from is None:
        return ""
    rate = config.optimizer.learning_rate
    lora = config.lora.rank is not None
    default = LORA_LEARNING_RATE if lora else CONTINUED_LEARNING_RATE
    option = "--lora.rank" if lora else "--init-from"
    usual = f" (the default of {option})" if rate == default else ""
    return f" from the weights of {config.init_from}, learning rate {rate:g}{usual}"


def _adapters(config: Config) -> str:
    """Describes what is trained, unless it is all of the model."""
    model = config.llama
    if model.lora is None:
        return ""
    learnt = sum(map(math.prod, trained(parameter_shapes(model)).values()))
    targets = model.lora.targets or adaptable_of(model)
    return (
        f"lora: {_count(learnt)} of them are trained, adapters of rank "
        f"{model.lora.rank} of {', '.join(targets)}; the others are frozen, in "
        f"{model.stored_dtype}\n"
    )


def _preferences(config: Config) -> str:
    """Describes what pairs of answers are compared with, if there are any."""
    beta = config.dpo.beta
    if beta is None:
        return ""
    if config.lora.rank is not None:
        return f"dpo: beta {beta:g}, the reference is the model without its adapters\n"
    return f"dpo: beta {beta:g}, the reference is a copy of the initial weights\n"


def _source(config: Config) -> str:
    if config.data.mixture:
        return " + ".join(str(path) for path, _ in config.data.mixture)
    if config.data.path is not None:
        return str(config.data.path)
    return "the source text of Python's standard library"


def _count(number: int) -> str:
    """Formats a number of parameters in words: 920 thousand, 8.03 billion."""
    for unit, size in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
