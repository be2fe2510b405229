"""The static arguments of an attention call, and its facts: checked, in one form."""

import dataclasses
from typing import Any

import jax
import numpy as np

from usp_jax import arguments, kernels
from usp_jax.head_chunks import usp_in_chunks
from usp_jax.kernels.logits import Logits
from usp_jax.masking import MaskRule
from usp_jax.schedules import Schedule, schedule
from usp_jax.shards import Shards
from usp_jax.usp import Call, Facts, usp


@dataclasses.dataclass(frozen=True)
class Options:
    """The checked static arguments of a call."""

    logits: Logits
    rule: MaskRule
    layouts: tuple[str, str]
    dropout_rate: float
    schedule: Schedule
    implementation: str
    return_residual: bool
    ulysses_chunks: int

    def attend(
        self, shards: Any, heads: Any, *arrays: Any
    ) -> tuple[jax.Array, None] | tuple[jax.Array, jax.Array]:
        """The call on these shards: (out, lse or None)."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        chunks = fields.pop("ulysses_chunks")
        call = Call(shards=shards, heads=heads, **fields)
        if chunks == 1:
            return usp(call, *arrays)
        own = heads.padded // heads.ulysses_size
        if own % chunks:
            raise ValueError(
                f"ulysses_chunks={chunks} must divide the query heads of a device, "
                f"{own}"
            )
        return usp_in_chunks(call, chunks, *arrays)


def checked(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    shards: Shards,
    ring_size: int,
    *,
    is_causal: Any,
    scale: Any,
    segment_ids: Any,
    positions: Any,
    local_window_size: Any,
    logits_soft_cap: Any,
    sinks: Any,
    prefix_length: Any,
    alibi_slopes: Any,
    dropout_rate: float,
    dropout_seed: Any,
    layout: Any,
    implementation: Any,
    return_residual: bool,
    ring_schedule: str,
    ring_inner: Any,
    ulysses_chunks: int,
) -> tuple[Options, Facts]:
    """What `usp_attention` is told, in one form.

    Raises:
      ValueError: as `usp_attention` says.
    """
    way = schedule(ring_schedule, ring_inner, ring_size)
    arguments.check_arrays(query, key, value)
    arguments.check_bool("return_residual", return_residual)
    arguments.check_dropout_rate(dropout_rate)
    arguments.check_positive_int("ulysses_chunks", ulysses_chunks)
    has_bias, drops = alibi_slopes is not None, dropout_rate > 0
    needs = {"alibi_slopes": has_bias, "dropout_rate": drops}
    rule = arguments.mask_rule(is_causal, local_window_size)
    further = {
        "segment_ids": segment_ids is not None,
        # They are read only where order matters.
        "positions": positions is not None and rule.after is not None,
        "prefix_length": prefix_length is not None,
        "local_window_size": rule.before is not None,
        "logits_soft_cap": logits_soft_cap is not None,
    }
    options = Options(
        arguments.logits(scale, logits_soft_cap, query.shape[3]),
        rule,
        arguments.layouts(layout),
        float(dropout_rate),
        way,
        kernels.choose(
            implementation,
            target=kernels.target_of(shards.mesh),
            dtype=query.dtype,
            head_size=max(query.shape[3], value.shape[3]),
            needs=tuple(name for name, asked in (needs | further).items() if asked),
        ),
        return_residual,
        ulysses_chunks,
    )
    batch, _, num_heads, _ = query.shape
    shapes = query.shape, key.shape
    positions = arguments.sides_of("positions", positions, *shapes)
    segment_ids = arguments.sides_of("segment_ids", segment_ids, *shapes)
    _check_positions(options.layouts, positions)
    arguments.check_by_head("alibi_slopes", alibi_slopes, num_heads)
    prefix = arguments.prefix(
        prefix_length,
        batch,
        rule,
        local_window_size=(rule.left, rule.right) != (None, None),
        **needs,
    )
    seed = arguments.dropout_seed(dropout_seed, options.dropout_rate)
    arguments.check_by_head("sinks", sinks, num_heads)
    rows = heads = None
    if seed is not None:
        rows, heads = (np.arange(n, dtype=np.int32) for n in (batch, num_heads))
        rows = shards.bound_index(shards.axes.batch) * batch + rows
        heads = shards.bound_index((shards.axes.tensor,)) * num_heads + heads
    return options, Facts(
        positions, segment_ids, prefix, rows, heads, alibi_slopes, seed
    )


def _check_positions(layouts: tuple[str, str], positions: Any) -> None:
    if "data" not in layouts:
        return
    sides = "[B, T]" if layouts[0] == layouts[1] else "[B, T] and [B, S], a pair"
    if positions is None or len(positions) < len(set(layouts)):
        raise ValueError(f'layout="data" needs positions=, int32 {sides}')
