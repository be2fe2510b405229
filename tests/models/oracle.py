"""A plain LLaMA: float64 numpy-like code on whole arrays, with neither stacked layers
nor sharding, RoPE as complex numbers, and attention by its definition."""

import math

import jax.numpy as jnp
import numpy as np

from usp_jax.models.llama import LlamaConfig


def logits(config: LlamaConfig, params: dict, tokens, segment_ids=None, xp=np):
    """[B, T, V]; `xp` is numpy for float64, or jax.numpy to be differentiated."""
    length = tokens.shape[1]
    order = np.tril(np.ones((length, length), bool))[None]
    seen = order
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        seen = order & same & (segment_ids >= 0)[:, None, :]
    x = params["embed"][tokens]
    for number in range(config.num_layers):
        w = {name: params[name][number] for name in (*LAYER, *MORE) if name in params}
        y = norm(config, x, w["attention_norm"], xp)
        q, k, v = (xp.einsum("btd,dnh->btnh", y, w[name]) for name in "qkv")
        if config.qkv_bias:
            added = (w[f"{name}_bias"] for name in "qkv")
            q, k, v = (x + b[None, None] for x, b in zip((q, k, v), added, strict=True))
        if config.qk_norm:
            q, k = norm(config, q, w["q_norm"], xp), norm(config, k, w["k_norm"], xp)
        groups = config.num_heads // config.num_kv_heads
        q, k = rope(config, q, xp), rope(config, k, xp)
        k, v = (xp.repeat(part, groups, 2) for part in (k, v))
        scores = xp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(config.head_size)
        scores = xp.where(seen[:, None], scores, -1e30)
        weights = xp.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        out = xp.einsum("bnts,bsnh->btnh", weights, v)
        x = x + xp.einsum("btnh,nhd->btd", out, w["o"])
        y = norm(config, x, w["mlp_norm"], xp)
        gate = xp.einsum("btd,df->btf", y, w["gate"])
        up = xp.einsum("btd,df->btf", y, w["up"])
        x = x + xp.einsum("btf,fd->btd", gate / (1 + xp.exp(-gate)) * up, w["down"])
    x = norm(config, x, params["final_norm"], xp)
    return xp.einsum("btd,vd->btv", x, params.get("lm_head", params["embed"]))


LAYER = ("attention_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
MORE = ("q_bias", "k_bias", "v_bias", "q_norm", "k_norm")


def nats(config: LlamaConfig, params: dict, tokens, labels, segment_ids=None):
    """The sum of the labels' negative log-likelihoods, to be differentiated."""
    scores = logits(config, params, tokens, segment_ids, jnp)
    top = scores.max(-1, keepdims=True)
    lse = top[..., 0] + jnp.log(jnp.exp(scores - top).sum(-1))
    hit = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(labels >= 0, lse - hit, 0))


def norm(config, x, weight, xp):
    mean = xp.mean(x * x, axis=-1, keepdims=True)
    return x / xp.sqrt(mean + config.rms_norm_eps) * weight[(None,) * (x.ndim - 1)]


def rope(config, x, xp):
    """Dims i and i + H/2 as a complex number, rotated by position · frequency."""
    half = config.head_size // 2
    turned = xp.asarray(np.exp(1j * np.outer(np.arange(x.shape[1]), rates(config))))
    z = (x[..., :half] + 1j * x[..., half:]) * turned[None, :, None]
    return xp.concatenate([z.real, z.imag], -1)


def rates(config):
    """Radians per position, for each pair of dims."""
    result = []
    for pair in range(config.head_size // 2):
        rate = config.rope_theta ** (-2 * pair / config.head_size)
        scaling = config.rope_scaling
        if scaling is not None:
            wavelength = 2 * math.pi / rate
            short = scaling.original_length / scaling.high_frequency_factor
            long = scaling.original_length / scaling.low_frequency_factor
            if wavelength > long:
                rate /= scaling.factor
            elif wavelength > short:
                smooth = scaling.original_length / wavelength
                smooth = (smooth - scaling.low_frequency_factor) / (
                    scaling.high_frequency_factor - scaling.low_frequency_factor
                )
                rate = (1 - smooth) * rate / scaling.factor + smooth * rate
        result.append(rate)
    return np.array(result)
