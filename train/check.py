"""Checks of a `Config` that need no device and no file."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.config import (
    STORED_LAYOUTS,
    Config,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    flatten,
)
from train.data.conversations import FORMS
from usp_jax.delta.arguments import LAYOUTS as DELTA_LAYOUTS
from usp_jax.layout import length_multiple
from usp_jax.models.decoder import kinds_of
from usp_jax.models.decoder_checks import check_targets
from usp_jax.models.execution import DTYPES
from usp_jax.models.optimizer import check_adamw
from usp_jax.models.training import check_router


def check(config: Config) -> None:
    """Raises ValueError, naming the option and the remedy, for an invalid config."""
    _check_numbers(config)
    for name, values in (("layout", STORED_LAYOUTS), ("dtype", DTYPES)):
        if getattr(config, name) not in values:
            raise ValueError(
                f"{name}={getattr(config, name)!r} must be one of {values}"
            )
    _check_delta(config)
    mesh, microbatches = config.mesh, config.pipeline.microbatches
    ways = mesh.data * mesh.fsdp * microbatches * config.accumulate
    if config.batch_size % ways:
        parts = f", {microbatches} micro-batches" if mesh.pipe > 1 else ""
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {ways} at "
            f"mesh.data={mesh.data}, mesh.fsdp={mesh.fsdp}{parts}, "
            f"accumulate={config.accumulate}"
        )
    _check_data(config.data, config.eval)
    _check_lora(config)
    _check_dpo(config.dpo.beta)
    if config.data.across_documents and config.layout == "balanced":
        raise ValueError(
            "data.across_documents=True cannot be combined with layout='balanced', "
            "which orders a row by its documents: use layout='zigzag'"
        )
    _check_length(config)
    _check_distributed(config.distributed)
    _check_traced(config)


def _check_delta(config: Config) -> None:
    kinds = kinds_of(config.model)
    if all(kind.delta is None for kind, _ in kinds) or config.layout in DELTA_LAYOUTS:
        return
    raise ValueError(
        f"layout={config.layout!r} must be one of {DELTA_LAYOUTS} for a model with the "
        "gated delta rule"
    )


def _check_length(config: Config) -> None:
    mesh = config.mesh
    tensor = mesh.tensor if config.model.tensor_sequence else 1
    multiple = length_multiple(config.layout, mesh.ring, mesh.ulysses, tensor)
    if config.sequence_length % multiple:
        also = f", mesh.tensor={tensor}" if tensor > 1 else ""
        raise ValueError(
            f"sequence_length={config.sequence_length} must be a multiple of "
            f"{multiple} for layout={config.layout!r} at mesh.ring={mesh.ring}, "
            f"mesh.ulysses={mesh.ulysses}{also}"
        )


def _check_numbers(config: Config) -> None:
    flat: dict[str, Any] = flatten(dataclasses.asdict(config))
    positive = (
        "steps sequence_length batch_size accumulate "
        "optimizer.max_skipped checkpoint.every checkpoint.keep "
        "log.every log.print_every log.spike_factor log.spike_window eval.batches "
        "passkey.shortest"
    )
    counts = (
        "seed sample.length "
        "checkpoint.stopped_status log.watchdog_seconds passkey.growth_rows"
    )
    sizes = [name for name in flat if name.startswith("mesh.")]
    sizes.remove("mesh.expert_axes")
    for name in positive.split() + sizes:
        if flat[name] is not None and not flat[name] > 0:
            raise ValueError(f"{name}={flat[name]} must be positive")
    for name in [*counts.split(), "sample.temperature"]:
        if not flat[name] >= 0:
            raise ValueError(f"{name}={flat[name]} must not be negative")
    optional = (
        "fake_devices eval.every checkpoint.every_minutes checkpoint.keep_period "
        "checkpoint.keep_minutes"
    )
    for name in optional.split():
        if flat[name] is not None and not flat[name] > 0:
            raise ValueError(f"{name}={flat[name]} must be positive")
    if flat["checkpoint.stopped_status"] > 255:
        raise ValueError(
            f"checkpoint.stopped_status={flat['checkpoint.stopped_status']} must be an "
            "exit status, at most 255"
        )
    check_adamw(config.optimizer, "optimizer.")
    check_router(config.router, "router.")
    _check_ranges(flat)
    if config.sample.length and not config.sample.prompt:
        raise ValueError(
            "sample.prompt='' must have at least one character, unless sample.length=0"
        )


def _check_ranges(flat: Mapping[str, Any]) -> None:
    # jax drops the higher bits of a seed.
    if not flat["seed"] < 2**32:
        raise ValueError(f"seed={flat['seed']} must be less than 2**32")
    for name, value in flat.items():
        # A gradient may have no maximum norm.
        unbounded = name in ("seed", "optimizer.clip_norm")
        if isinstance(value, int) and not unbounded and not value < 2**31:
            raise ValueError(f"{name}={value} must be less than 2**31")
        if isinstance(value, float) and not unbounded and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite")
    tokens = flat["batch_size"] * flat["sequence_length"]
    if not tokens < 2**31:
        raise ValueError(
            f"batch_size={flat['batch_size']} rows of sequence_length="
            f"{flat['sequence_length']} have {tokens} tokens: a step must have less "
            "than 2**31"
        )
    # Heartbeats are written to a disk eight times as often.
    seconds = flat["log.watchdog_seconds"]
    if seconds and not 0.1 <= seconds <= 1e9:
        raise ValueError(
            f"log.watchdog_seconds={seconds} must be 0, which disables the watchdog, "
            "or between 0.1 and 1e9"
        )


def _check_data(data: DataConfig, evaluation: EvalConfig) -> None:
    if data.form not in (None, *FORMS):
        raise ValueError(f"data.form={data.form!r} must be one of {FORMS}")
    if data.mixture and data.path is not None:
        raise ValueError(
            f"data.path={data.path} and data.mixture={_as_option(data.mixture)} cannot "
            "be combined: give one of them"
        )
    for path, weight in data.mixture:
        if not 0 < weight < math.inf:
            raise ValueError(
                f"data.mixture: the weight {weight} of {path} must be positive"
            )
    if not 0 <= data.eval_fraction < 1:
        raise ValueError(f"data.eval_fraction={data.eval_fraction} must be in [0, 1)")
    if bool(data.eval_fraction) != (evaluation.every is not None):
        raise ValueError(
            f"data.eval_fraction={data.eval_fraction}, eval.every={evaluation.every}: "
            "give both, the fraction to hold out and the steps between evaluations"
        )


def _check_lora(config: Config) -> None:
    lora = config.lora
    if lora.rank is None:
        if lora.alpha is not None or lora.targets:
            raise ValueError(
                f"lora.alpha={lora.alpha}, lora.targets={lora.targets} need --lora.rank"
            )
        return
    if config.init_from is None:
        raise ValueError(
            f"lora.rank={lora.rank} freezes all weights but the adapters': give "
            "--init-from FOLDER with trained ones"
        )
    check_targets(config.llama)


def _check_dpo(beta: float | None) -> None:
    if beta is not None and not beta > 0:
        raise ValueError(f"dpo.beta={beta} must be positive")


def _as_option(mixture: Sequence[tuple[Path, float]]) -> str:
    return " ".join(f"{path} {weight}" for path, weight in mixture)


def _check_traced(config: Config) -> None:
    traced = config.profile.traced
    if traced and traced[-1] > config.steps:
        raise ValueError(
            f"profile.steps={config.profile.steps!r} must end at {config.steps + 1} or "
            f"earlier, because steps={config.steps}"
        )


def _check_distributed(config: DistributedConfig) -> None:
    number, own = config.num_processes, config.process_id
    present = (number is not None, own is not None)
    explicit = config.coordinator not in (None, "auto")
    if explicit != all(present) or any(present) != all(present):
        raise ValueError(
            f"distributed.coordinator={config.coordinator!r}, "
            f"num_processes={config.num_processes}, process_id={config.process_id}: "
            "give all three, with coordinator=host:port; or only coordinator=auto; or "
            "none of them"
        )
    address = re.fullmatch(r".+:(\d{1,5})", config.coordinator or "")
    if explicit and not (address and int(address[1]) < 2**16):
        raise ValueError(
            f"distributed.coordinator={config.coordinator!r} must be host:port or auto"
        )
    if number is not None and own is not None and not 0 <= own < number:
        raise ValueError(
            f"distributed.process_id={own} must be at least 0 and less than "
            f"num_processes={number}"
        )
