"""The options of attention: the list, the defaults, and the checks that make a call.

`usp_attention` documents each option. Every other entry point takes
`**options: Unpack[Options]`, or `Unpack[StaticOptions]` where options are fixed once,
and passes them on unchanged.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypedDict

import jax
import numpy as np
from jaxtyping import Array, Float, Integer

from usp_jax import arguments, kernels
from usp_jax.call import Call, Facts
from usp_jax.checks import check_bool
from usp_jax.masking import MaskRule
from usp_jax.mesh import axis_names, axis_size
from usp_jax.ring import Schedule, schedule_of
from usp_jax.shards import Shards
from usp_jax.ulysses import Heads

Ids = (
    Integer[Array, "*B T"]
    | Integer[np.ndarray, "*B T"]
    | tuple[
        Integer[Array, "*B T"] | Integer[np.ndarray, "*B T"],
        Integer[Array, "*B S"] | Integer[np.ndarray, "*B S"],
    ]
)
Window = int | tuple[int | None, int | None] | None


class StaticOptions(TypedDict, total=False):
    """Options that are Python values, fixed when a program is traced.

    `usp_attention` documents them in full, with their defaults.

    Attributes:
      is_causal: if True, a query sees no key after its own position.
      scale: factor of q·k; None is 1 / sqrt(H).
      local_window_size: (left, right) bounds on the distance of a key; an int sets
        both, None means no bound.
      logits_soft_cap: c turns each logit x into c · tanh(x / c).
      dropout_rate: fraction of the softmax weights to drop.
      layout: order in which the tokens are stored, or a pair (query's, key's).
      implementation: name of the kernel; None picks one for the devices.
      return_residual: if True, also returns the log-sum-exp of the logits.
      ring_schedule: name or object that says how keys and queries meet.
      ulysses_chunks: number of head groups that each device processes in turn.
    """

    is_causal: bool
    scale: float | None
    local_window_size: Window
    logits_soft_cap: float | None
    dropout_rate: float
    layout: str | tuple[str, str]
    implementation: str | None
    return_residual: bool
    ring_schedule: str | Schedule
    ulysses_chunks: int


class Options(StaticOptions, total=False):
    """All options that may follow the arrays of an attention function.

    Adds to `StaticOptions` the ones that may be arrays.

    Attributes:
      segment_ids: integers [B, T], or a pair for queries and keys; -1 is padding.
      positions: integers [B, T], or a pair; causal and window masks compare them.
      sinks: floating [N], an extra softmax logit for each head, without a value.
      prefix_length: integers [B]; tokens at positions below it see each other in both
        directions.
      alibi_slopes: floating [N], the slopes of ALiBi's bias.
      dropout_seed: integer seed of the dropped weights.
    """

    segment_ids: Ids | None
    positions: Ids | None
    sinks: Float[Array, " N"] | None
    prefix_length: Integer[Array, "*B"] | None
    alibi_slopes: Float[Array, " N"] | None
    dropout_seed: int | Integer[Array, ""] | None


DEFAULTS = Options(
    is_causal=False,
    scale=None,
    segment_ids=None,
    positions=None,
    local_window_size=None,
    logits_soft_cap=None,
    sinks=None,
    prefix_length=None,
    alibi_slopes=None,
    dropout_rate=0.0,
    dropout_seed=None,
    layout="contiguous",
    implementation=None,
    return_residual=False,
    ring_schedule="unidirectional",
    ulysses_chunks=1,
)

# Options of other attention functions, and what to use here instead.
INSTEAD = {
    "mask": "a dense mask has T·S entries: use is_causal, local_window_size, "
    "prefix_length or, for documents and padding, segment_ids",
    "bias": "a bias has T·S entries: use alibi_slopes, or encode positions in query "
    "and key, as RoPE does",
    "query_seq_lengths": "use segment_ids, with -1 for padding",
    "key_value_seq_lengths": "use segment_ids, with -1 for padding",
    "ring_inner": 'use ring_schedule="double:4" for inner rings of 4 devices',
}


def completed(
    function: str,
    options: Options,
    *,
    refused: Mapping[str, str] = MappingProxyType({}),
    defaults: Options = DEFAULTS,
) -> Options:
    """Fills in the defaults of the options that are not given.

    Args:
      function: name of the function that takes the options, for error messages.
      refused: options the function cannot honour, each with the reason. They may only
        have their default value.
      defaults: the function's own defaults.

    Raises:
      TypeError: an option does not exist.
      ValueError: an option is refused, or belongs to another library's function.
    """
    for name, value in options.items():
        if name in INSTEAD:
            raise ValueError(f"{function} cannot honour {name}=: {INSTEAD[name]}")
        if name not in DEFAULTS:
            raise TypeError(
                f"{function}() has no option {name!r}; it has {tuple(DEFAULTS)}"
            )
        if name in refused and not _is_default(name, value):
            raise ValueError(f"{function} cannot honour {name}=: {refused[name]}")
    return defaults | options


def _is_default(name: str, value: object) -> bool:
    """Returns True if an option has its default value; an array never has."""
    default = DEFAULTS.get(name)
    return value is default or (type(value) in (str, int, float) and value == default)


def checked(
    query: jax.Array,
    key: arguments.Typed,
    value: arguments.Typed,
    shards: Shards,
    options: Options,
) -> tuple[Call, jax.Array | None, Facts]:
    """Checks completed options and makes the call, its sinks and its facts from them.

    Args:
      query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, V].

    Raises:
      ValueError: as in `usp_attention`.
    """
    arguments.check_arrays(query, key, value)
    check_bool("return_residual", options["return_residual"])
    rate = arguments.dropout_rate(options["dropout_rate"])
    rule = arguments.mask_rule(options["is_causal"], options["local_window_size"])
    layouts = arguments.layouts(options["layout"])
    schedule = schedule_of(options["ring_schedule"], shards.ring_size)
    arguments.check_divides(query, key, shards, layouts)
    tensor = axis_size(shards.mesh, shards.axes.tensor)
    heads = Heads(query.shape[2] // tensor, key.shape[2] // tensor, shards.ulysses_size)
    groups = arguments.head_groups(options["ulysses_chunks"], heads)
    facts = _facts(query, key, shards, options, rate)
    _check_together(layouts, rule, facts, options)
    arguments.check_by_head("sinks", options["sinks"], query.shape[2])
    needs = {
        "alibi_slopes": facts.slopes is not None,
        "dropout_rate": rate > 0,
        "segment_ids": facts.segment_ids is not None,
        # Positions are read only where order matters.
        "positions": facts.positions is not None
        and (rule.before, rule.after) != (None, None),
        "prefix_length": facts.prefix is not None,
        "local_window_size": rule.before is not None,
        "logits_soft_cap": options["logits_soft_cap"] is not None,
    }
    call = Call(
        shards=shards,
        heads=heads,
        logits=arguments.logits(
            options["scale"], options["logits_soft_cap"], query.shape[3], query.dtype
        ),
        rule=rule,
        layouts=layouts,
        dropout_rate=rate,
        schedule=schedule,
        implementation=kernels.choose(
            options["implementation"],
            target=kernels.target_of(shards.mesh),
            dtype=query.dtype,
            head_size=max(query.shape[3], value.shape[3]),
            needs=tuple(name for name, is_needed in needs.items() if is_needed),
        ),
        return_residual=options["return_residual"],
        head_groups=groups,
    )
    return call, options["sinks"], facts


def _facts(
    query: jax.Array,
    key: arguments.Typed,
    shards: Shards,
    options: Options,
    rate: float,
) -> Facts:
    """Makes the facts of a call, each checked on its own."""
    batch, _, num_heads, _ = query.shape
    shapes = query.shape, key.shape
    arguments.check_by_head("alibi_slopes", options["alibi_slopes"], num_heads)
    seed = arguments.dropout_seed(options["dropout_seed"], rate)

    def numbers(count: int, axes: tuple[str, ...]) -> jax.Array | np.ndarray | None:
        """Global indices of this device's rows or heads; only dropout needs them."""
        if seed is None:
            return None
        return shards.bound_index(axes) * count + np.arange(count, dtype=np.int32)

    return Facts(
        positions=arguments.positions_of(options["positions"], *shapes),
        segment_ids=arguments.sides_of("segment_ids", options["segment_ids"], *shapes),
        prefix=arguments.prefix(options["prefix_length"], batch),
        rows=numbers(batch, shards.axes.batch),
        heads=numbers(num_heads, axis_names(shards.axes.tensor)),
        slopes=options["alibi_slopes"],
        seed=seed,
    )


def _check_together(
    layouts: tuple[str, str], rule: MaskRule, facts: Facts, options: Options
) -> None:
    """Checks options that depend on each other."""
    if "data" in layouts:
        sides = "[B, T]" if layouts[0] == layouts[1] else "[B, T] and [B, S], a pair"
        positions = facts.positions
        if positions is None or len(positions) < len(set(layouts)):
            raise ValueError(f'layout="data" needs positions=, int32 {sides}')
    if facts.prefix is None:
        return
    if not rule.is_causal:
        raise ValueError("prefix_length= needs is_causal=True: it widens a causal mask")
    others = {
        "local_window_size": (rule.left, rule.right) != (None, None),
        "alibi_slopes": facts.slopes is not None,
        "dropout_rate": facts.seed is not None,
    }
    for name, is_used in others.items():
        if is_used:
            raise ValueError(
                f"prefix_length= cannot be combined with {name}=, which needs the "
                "positions of the tokens in the prefix"
            )
