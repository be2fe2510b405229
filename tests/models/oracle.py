"""A plain decoder: float64 numpy-like code on whole arrays, with neither stacked layers
nor sharding, RoPE as complex numbers, and attention by its definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from usp_jax.delta.reference import reference_gated_delta
from usp_jax.models.decoder import of_kind
from usp_jax.models.llama import LlamaConfig
from usp_jax.models.parameters import layer_stacks


def logits(
    config: LlamaConfig, params: dict, tokens, segment_ids=None, xp=np, routed=None
):
    """[B, T, V]; `xp` is numpy for float64, or jax.numpy to be differentiated.

    The losses and loads of routers are appended to the list `routed`.
    """
    length = tokens.shape[1]
    seen = np.tril(np.ones((length, length), bool))[None]
    real = np.ones(tokens.shape, bool)
    routed = [] if routed is None else routed
    if segment_ids is not None:
        real = segment_ids >= 0
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        seen = seen & same & (segment_ids >= 0)[:, None, :]
    x = params["embed"][tokens] * config.embedding_scale
    rows = dict.fromkeys(params, 0)
    for number in range(config.num_layers):
        kind = config.kind_at(number)
        w = {}
        for name, full in layer_stacks(config, kind).items():
            w[name] = params[full][rows[full]]
            rows[full] += 1
        own = of_kind(config, kind)
        x = layer(own, w, x, seen, real, xp, routed, segment_ids)
    x = norm(config, x, params["final_norm"], xp)
    x = xp.einsum("btd,vd->btv", x, params.get("lm_head", params["embed"]))
    return cap(x, config.final_soft_cap, xp)


def layer(config: LlamaConfig, w: dict, x, seen, real, xp, routed, ids):
    """One layer of the default kind."""
    y = maybe_norm(config, x, w, "attention_norm", xp)
    if config.delta is None:
        out = attention(config, w, y, seen, xp)
    else:
        out = delta(config, w, y, ids)
    x = x + maybe_norm(config, out, w, "attention_out_norm", xp)
    y = maybe_norm(config, x, w, "mlp_norm", xp)
    if config.experts is None:
        out = gated(config, y, w["gate"], w["up"], w["down"], xp)
    else:
        out = experts(config, w, y, real, xp, routed)
    return x + maybe_norm(config, out, w, "mlp_out_norm", xp)


def gated(config, y, gate, up, down, xp):
    hidden = activation(config, y @ gate, xp) * (y @ up)
    return hidden @ down


def experts(config: LlamaConfig, w: dict, y, real, xp, routed):
    """Every expert computes every token; those that are not chosen have weight 0."""
    e = config.experts
    logits = y @ w["router"] + w.get("router_bias", 0)
    scores = 1 / (1 + xp.exp(-logits))
    odds = xp.exp(logits)
    if e.scores == "softmax":
        scores = odds / odds.sum(-1, keepdims=True)
    biased = scores + w.get("router_correction_bias", 0)
    if e.groups > 1:
        grouped = biased.reshape(*biased.shape[:2], e.groups, -1)
        best = xp.where(best_of(grouped, 2), grouped, 0).sum(-1)
        allowed = best_of(best, e.groups_per_token)
        biased = xp.where(allowed[..., None], grouped, -1e30).reshape(biased.shape)
    chosen = best_of(biased, e.experts_per_token) & real[..., None]
    weights = xp.where(chosen, scores, 0)
    if e.renormalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    weights, out = e.scaling * weights, 0
    for number in range(e.num_experts):
        gate, up, down = (w[f"expert_{n}"][number] for n in ("gate", "up", "down"))
        if e.biases:
            a = y @ gate + w["expert_gate_bias"][number]
            b = y @ up + w["expert_up_bias"][number]
            a, b = xp.minimum(a, e.clamp), xp.clip(b, -e.clamp, e.clamp)
            own = (b + 1) * a / (1 + xp.exp(-1.702 * a)) @ down
            own = own + w["expert_down_bias"][number]
        else:
            own = gated(config, y, gate, up, down, xp)
        out = out + weights[..., number, None] * own
    if e.shared_d_ff:
        own = (w[f"shared_{name}"] for name in ("gate", "up", "down"))
        shared = gated(config, y, *own, xp)
        if e.shared_gate:
            shared = shared / (1 + xp.exp(-(y @ w["shared_scale"])))[..., None]
        out = out + xp.where(real[..., None], shared, 0)
    share = scores / scores.sum(-1, keepdims=True)
    mean = xp.where(real[..., None], share, 0).sum((0, 1)) / real.sum()
    load = chosen.sum((0, 1))
    balance = e.num_experts * (load / load.sum() * mean).sum()
    square = xp.where(real, xp.log(odds.sum(-1)) ** 2, 0)
    routed.append((balance, square.sum() / real.sum(), load))
    return out


def best_of(x, number):
    """Whether each of the last dim is among the largest; the first of equal ones."""
    mine, other, places = x[..., :, None], x[..., None, :], np.arange(x.shape[-1])
    earlier = places[None] < places[:, None]
    return ((other > mine) | ((other == mine) & earlier)).sum(-1) < number


def attention(config: LlamaConfig, w: dict, y, seen, xp):
    if config.latent is not None:
        q, k, v = latent_heads(config, w, y, xp)
    else:
        q, k, v = heads(config, w, y, xp)
    scores = xp.einsum("btnh,bsnh->bnts", q, k)
    gate = None
    if config.output_gate:
        gate = 1 / (1 + xp.exp(-xp.einsum("btd,dnh->btnh", y, w["output_gate"])))
    return output(config, w, scores, v, seen, xp, gate)


def delta(config: LlamaConfig, w: dict, y, ids):
    """Gated DeltaNet: a loop over taps, then over tokens, with one state for all."""
    ids = jnp.zeros(y.shape[:2], jnp.int32) if ids is None else ids
    q, k, v = (mixed(y, w[f"delta_{x}"], w[f"delta_{x}_conv"], ids) for x in "qkv")
    v = v.reshape(*v.shape[:2], -1, config.delta.value_size)
    q, k = (x / jnp.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    rate = jnp.exp(w["delta_log_rate"])[None, None]
    decay = jnp.einsum("btd,dng->btng", y, w["delta_decay"])
    decay = -rate * jnp.log(1 + jnp.exp(decay + w["delta_decay_bias"][None, None]))
    beta = 1 / (1 + jnp.exp(-jnp.einsum("btd,dng->btng", y, w["delta_beta"])))
    gates = {"log_decay": decay, "beta": beta}
    gates = {name: x.reshape(*v.shape[:3]) for name, x in gates.items()}
    q = q / math.sqrt(config.delta.key_size)
    out, _ = reference_gated_delta(q, k, v, **gates, segment_ids=ids)
    mean = (out * out).mean(-1, keepdims=True)
    out = out / jnp.sqrt(mean + config.rms_norm_eps) * w["delta_norm"][None, None, None]
    gate = jnp.einsum("btd,dnz->btnz", y, w["delta_gate"])
    out = out.reshape(gate.shape) * jax.nn.silu(gate)
    return jnp.einsum("btnz,nzd->btd", out, w["delta_o"])


def mixed(y, matrix, taps, ids):
    """Projects, convolves over the tokens of each document, and applies SiLU."""
    x, out = jnp.einsum("btd,dnh->btnh", y, matrix), 0
    for back in range(taps.shape[-1]):
        tap = taps[None, None, ..., -1 - back]
        shift = ((0, 0), (back, 0))
        before = jnp.pad(x, (*shift, (0, 0), (0, 0)))[:, : x.shape[1]]
        same = jnp.pad(ids, shift, constant_values=-1)[:, : x.shape[1]] == ids
        out = out + jnp.where(same[..., None, None], before, 0) * tap
    return jax.nn.silu(out)


def heads(config: LlamaConfig, w: dict, y, xp):
    q, k, v = (xp.einsum("btd,dnh->btnh", y, w[name]) for name in "qkv")
    if config.qkv_bias:
        added = (w[f"{name}_bias"] for name in "qkv")
        q, k, v = (x + b[None, None] for x, b in zip((q, k, v), added, strict=True))
    if config.qk_norm:
        q, k = norm(config, q, w["q_norm"], xp), norm(config, k, w["k_norm"], xp)
    if config.whole_qk_norm:
        q = whole_norm(config, q, w["whole_q_norm"], xp)
        k = whole_norm(config, k, w["whole_k_norm"], xp)
    groups = config.num_heads // config.num_kv_heads
    q, k = rope(config, q, xp), rope(config, k, xp)
    return q, *(xp.repeat(part, groups, 2) for part in (k, v))


def latent_heads(config: LlamaConfig, w: dict, y, xp):
    """DeepSeek-V2, arXiv 2405.04434, equations 9 to 19."""
    size = config.latent.rope_size
    low = norm(config, y @ w["q_down"], w["q_down_norm"], xp)
    q = xp.einsum("btr,rnh->btnh", low, w["q_up"])
    q = xp.concatenate([q[..., :-size], rope(config, q[..., -size:], xp)], -1)
    kv = y @ w["kv_down"]
    latent = norm(config, kv[..., :-size], w["kv_down_norm"], xp)
    shared = rope(config, kv[..., None, -size:], xp)
    k = xp.einsum("btc,cnh->btnh", latent, w["k_up"])
    shared = xp.repeat(shared, config.num_heads, 2)
    v = xp.einsum("btc,cnh->btnh", latent, w["v_up"])
    return q, xp.concatenate([k, shared], -1), v


def output(config: LlamaConfig, w: dict, scores, v, seen, xp, gate):
    scores = scores * (config.attention_scale or 1 / math.sqrt(config.head_size))
    scores = cap(scores, config.logits_soft_cap, xp)
    if config.window is not None:
        places = np.arange(v.shape[1])
        seen = seen & (places[:, None] - places[None] < config.window)[None]
    scores = xp.where(seen[:, None], scores, -1e30)
    top = scores.max(-1, keepdims=True)
    weights = xp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if config.sinks:
        # Padding sees nothing: its top is -1e30.
        sinks = w["sinks"][None, :, None, None]
        total = total + xp.exp(xp.minimum(sinks - top, 100))
    out = xp.einsum("bnts,bsnh->btnh", weights / total, v)
    out = out if gate is None else out * gate
    return xp.einsum("btnh,nhd->btd", out, w["o"]) + w.get("o_bias", 0)


def activation(config: LlamaConfig, x, xp):
    if config.activation == "silu":
        return x / (1 + xp.exp(-x))
    return x / 2 * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def cap(x, soft_cap, xp):
    return x if soft_cap is None else soft_cap * xp.tanh(x / soft_cap)


def nats(
    config: LlamaConfig, params: dict, tokens, labels, segment_ids=None, routed=None
):
    """The sum of the labels' negative log-likelihoods, to be differentiated."""
    scores = logits(config, params, tokens, segment_ids, jnp, routed)
    top = scores.max(-1, keepdims=True)
    lse = top[..., 0] + jnp.log(jnp.exp(scores - top).sum(-1))
    hit = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(labels >= 0, lse - hit, 0))


def maybe_norm(config, x, w, name, xp):
    return norm(config, x, w[name], xp) if name in w else x


def norm(config, x, weight, xp):
    mean = xp.mean(x * x, axis=-1, keepdims=True)
    weight = weight + 1 if config.zero_centered_norms else weight
    return x / xp.sqrt(mean + config.rms_norm_eps) * weight[(None,) * (x.ndim - 1)]


def whole_norm(config, x, weight, xp):
    flat = norm(config, x.reshape(*x.shape[:2], -1), weight.reshape(-1), xp)
    return flat.reshape(x.shape)


def rope(config, x, xp):
    """Dims i and i + h as a complex number, rotated by position · frequency."""
    half = rotary_size(config) // 2
    turned = xp.asarray(np.exp(1j * np.outer(np.arange(x.shape[1]), rates(config))))
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * turned[None, :, None]
    return xp.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)


def rotary_size(config):
    if config.latent is not None:
        return config.latent.rope_size
    return config.head_size if config.rotary_size is None else config.rotary_size


def rates(config):
    """Radians per position, for each pair of dims."""
    result = []
    for pair in range(rotary_size(config) // 2):
        rate = config.rope_theta ** (-2 * pair / rotary_size(config))
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
