"""The static arguments of an attention call, and its facts: checked, in one form."""

import dataclasses

import numpy as np

from usp_jax import arguments, kernels
from usp_jax.head_chunks import usp_in_chunks
from usp_jax.kernels.logits import Logits
from usp_jax.masking import MaskRule
from usp_jax.schedules import Schedule
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

    @classmethod
    def of(
        cls,
        query,
        key,
        value,
        mesh,
        *,
        is_causal,
        scale,
        local_window_size,
        logits_soft_cap,
        has_bias,
        dropout_rate,
        layout,
        schedule,
        implementation,
        return_residual,
        ulysses_chunks,
    ):
        arguments.check_arrays(query, key, value)
        arguments.check_bool("return_residual", return_residual)
        arguments.check_dropout_rate(dropout_rate)
        arguments.check_positive_int("ulysses_chunks", ulysses_chunks)
        needs = {"alibi_slopes": has_bias, "dropout_rate": dropout_rate > 0}
        return cls(
            arguments.logits(scale, logits_soft_cap, query.shape[3]),
            arguments.mask_rule(is_causal, local_window_size),
            arguments.layouts(layout),
            float(dropout_rate),
            schedule,
            kernels.choose(
                implementation,
                target=kernels.target_of(mesh),
                dtype=query.dtype,
                head_size=max(query.shape[3], value.shape[3]),
                needs=next((name for name, asked in needs.items() if asked), None),
            ),
            return_residual,
            ulysses_chunks,
        )

    def facts(
        self,
        query,
        key,
        shards,
        *,
        positions,
        segment_ids,
        prefix_length,
        alibi_slopes,
        dropout_seed,
    ) -> Facts:
        """The checked array arguments, beside q, k, v and the sinks."""
        batch, _, num_heads, _ = query.shape
        sides = {"positions": positions, "segment_ids": segment_ids}
        sides = {
            name: arguments.sides_of(name, x, query.shape, key.shape)
            for name, x in sides.items()
        }
        _check_positions(self.layouts, sides["positions"])
        arguments.check_by_head("alibi_slopes", alibi_slopes, num_heads)
        prefix = arguments.prefix(
            prefix_length,
            batch,
            self.rule,
            local_window_size=(self.rule.left, self.rule.right) != (None, None),
            alibi_slopes=alibi_slopes is not None,
            dropout_rate=self.dropout_rate > 0,
        )
        seed = arguments.dropout_seed(dropout_seed, self.dropout_rate)
        rows = heads = None
        if seed is not None:
            rows, heads = (np.arange(n, dtype=np.int32) for n in (batch, num_heads))
            rows = shards.bound_index(shards.axes.batch) * batch + rows
            heads = shards.bound_index((shards.axes.tensor,)) * num_heads + heads
        return Facts(
            **sides,
            prefix=prefix,
            rows=rows,
            heads=heads,
            slopes=alibi_slopes,
            seed=seed,
        )

    def attend(self, shards, heads, *arrays):
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


def _check_positions(layouts, positions):
    if "data" not in layouts:
        return
    sides = "[B, T]" if layouts[0] == layouts[1] else "[B, T] and [B, S], a pair"
    if positions is None or len(positions) < len(set(layouts)):
        raise ValueError(f'layout="data" needs positions=, int32 {sides}')
