"""The packages dew_flash_attn 0.3.6 and fa4_jax 0.1.0, emulated in plain jax.

Only the functions that usp_jax calls, with the packages' signatures.
"""

import dataclasses
import sys
import types
from typing import Any

import pytest

from tests.kernels import emulated as plain

NAMES = ("fa2", "fa3", "fa4")


def forward2(query, key, value, scale, causal, window):
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    return plain.attention(
        query, key, value, scale, dew_seen(query, key, causal, window)
    )


def backward2(grad, query, key, value, out, lse, scale, causal, window):
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    seen = dew_seen(query, key, causal, window)
    return plain.backward(query, key, value, lse, out, grad, scale, seen)


def forward3(query, key, value, starts, longest, scale, causal, window):
    assert starts is None and longest is None
    return forward2(query, key, value, scale, causal, window)


def backward3(
    grad, query, key, value, out, lse, starts, longest, scale, causal, window
):
    assert starts is None and longest is None
    return backward2(grad, query, key, value, out, lse, scale, causal, window)


def flash_attn(
    q,
    k,
    v,
    *,
    causal=False,
    window_size=None,
    scale=None,
    mask_mod=None,
    return_lse=False,
    backend=None,
):
    assert return_lse and mask_mod is None and backend == "cute"
    seen = bounded(q, k, *window_size, causal)
    return plain.attention(q, k, v, scale, seen)


@dataclasses.dataclass(frozen=True)
class AttnConfig:
    causal: bool
    local: bool
    window: tuple[int | None, int | None]
    scale: float
    mask: Any
    backend: str


class Backward:
    """The primitive `fa4_vjp_p`."""

    @staticmethod
    def bind(q, k, v, out, lse, d_out, *, cfg, has_d_lse):
        assert cfg.mask is None and cfg.backend == "cute" and not has_d_lse
        # At most one kind of mask, and bounds only for the local one.
        assert not (cfg.causal and cfg.local)
        assert cfg.local == (cfg.window != (None, None))
        seen = bounded(q, k, *cfg.window, cfg.causal)
        return plain.backward(q, k, v, lse, out, d_out, cfg.scale, seen)


@pytest.fixture
def flash(monkeypatch):
    """Lets "fa2", "fa3" and "fa4" run on any device, in float32 too."""
    dew, fa4 = types.ModuleType("dew_flash_attn"), types.ModuleType("fa4_jax")
    for name, function in (
        ("_forward2", forward2),
        ("_backward2", backward2),
        ("_forward3", forward3),
        ("_backward3", backward3),
    ):
        setattr(dew, name, function)
    attention = types.ModuleType("fa4_jax.attention")
    attention.AttnConfig, attention.fa4_vjp_p = AttnConfig, Backward
    fa4.flash_attn, fa4.attention = flash_attn, attention
    for module in (dew, fa4, attention):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    plain.run_anywhere(monkeypatch, *NAMES)


def dew_seen(query, key, causal, window):
    assert window[1] == 0 if causal else window[1] != 0
    left, right = (None if bound < 0 else bound for bound in window)
    return bounded(query, key, left, right, causal)


def bounded(q, k, left, right, causal):
    """The packages count from the last query and key; negative bounds are none."""
    rows, keys, right = q.shape[1], k.shape[1], 0 if causal else right
    assert left is None or left >= 0
    assert right is None or right >= 0
    # Every row sees a key: the packages differ in the lse of one that sees none.
    assert right is None or keys - rows + right >= 0
    assert left is None or left >= 0
    return plain.band(rows, keys, left, right)
