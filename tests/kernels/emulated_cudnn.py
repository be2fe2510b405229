"""cuDNN's two calls emulated in plain jax, with results in the inputs' dtype."""

import pytest

from tests.kernels import emulated as plain
from usp_jax import _compat


def attention(q, k, v, scale, is_causal, before=None):
    return plain.attention(q, k, v, scale, _seen(q, k, is_causal, before))


def backward(q, k, v, lse, out, dout, scale, is_causal, before=None):
    seen = _seen(q, k, is_causal, before)
    return plain.backward(q, k, v, lse, out, dout, scale, seen)


@pytest.fixture
def emulated(monkeypatch):
    """Lets implementation="cudnn" run on any device, in float32 too."""
    plain.run_anywhere(monkeypatch, "cudnn")
    monkeypatch.setattr(_compat, "cudnn_attention", attention)
    monkeypatch.setattr(_compat, "cudnn_attention_backward", backward)


def _seen(q, k, is_causal, before):
    assert q.shape[3] == k.shape[3]
    # Its window needs a causal mask, which counts from the first row.
    assert is_causal or before is None
    assert not is_causal or q.shape[1] == k.shape[1]
    return plain.band(q.shape[1], k.shape[1], before, 0 if is_causal else None)
