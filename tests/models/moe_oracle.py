"""A feed-forward network of experts by its definition, on one device, token by token.

Experts are chosen in numpy; what has a gradient is computed in jnp, for all experts and
tokens.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from usp_jax.models.experts import Experts


def scores_of(experts: Experts, logits, xp=np):
    if experts.scores == "softmax":
        exponentials = xp.exp(logits - xp.max(logits, -1, keepdims=True))
        return exponentials / xp.sum(exponentials, -1, keepdims=True)
    return 1 / (1 + xp.exp(-logits))


def chosen(experts: Experts, scores, correction):
    """The ids [T, k] of the experts of each token, best first."""
    groups = experts.groups
    ids = []
    for token in np.asarray(scores):
        token = token + (0 if correction is None else np.asarray(correction))
        best = [np.sort(group)[-2:].sum() for group in np.split(token, groups)]
        allowed = np.argsort(best)[groups - experts.groups_per_token :]
        size = len(token) // groups
        order = [e for e in np.argsort(-token) if e // size in allowed]
        ids.append(order[: experts.experts_per_token])
    return np.array(ids)


def kept_pairs(experts: Experts, ids, real, sources, factor):
    """Which pairs an expert's capacity keeps; sources has the tokens of each device."""
    kept = np.repeat(np.asarray(real)[:, None], ids.shape[1], 1)
    if factor is None:
        return kept
    for tokens in sources:
        pairs = len(tokens) * experts.experts_per_token
        left = np.full(
            experts.num_experts, math.ceil(factor * pairs / experts.num_experts)
        )
        for token in tokens:
            for place, expert in enumerate(ids[token]):
                if kept[token, place]:
                    kept[token, place] = left[expert] > 0
                    left[expert] -= 1
    return kept


def gated(experts: Experts, x, gate, up, down, biases=(0, 0, 0)):
    gate, up = x @ gate + biases[0], x @ up + biases[1]
    if experts.clamp is None:
        hidden = gate / (1 + jnp.exp(-gate)) * up
    else:
        gate = jnp.where(gate > experts.clamp, experts.clamp, gate)
        up = jnp.where(up > experts.clamp, experts.clamp, up)
        up = jnp.where(up < -experts.clamp, -experts.clamp, up)
        hidden = (up + 1) * gate / (1 + jnp.exp(-1.702 * gate))
    return hidden @ down + biases[2]


def layer(experts: Experts, params, x, real, ids, kept):
    """Returns the outputs [T, D], the load-balancing loss and the z-loss."""
    logits = x @ params["router"]
    if experts.router_bias:
        logits = logits + params["router_bias"][None]
    scores = scores_of(experts, logits, jnp)
    rows = np.arange(len(ids))[:, None]
    weights = scores[rows, ids]
    if experts.renormalize:
        weights = weights / jnp.sum(weights, -1, keepdims=True)
    weights = jnp.where(kept, weights * experts.scaling, 0)
    outs = []
    for expert in range(experts.num_experts):
        own = {k: v[expert] for k, v in params.items() if k.startswith("experts_")}
        matrices = own["experts_gate"], own["experts_up"], own["experts_down"]
        biases = (0, 0, 0)
        if experts.biases:
            biases = tuple(
                own[f"experts_{name}_bias"][None] for name in ("gate", "up", "down")
            )
        outs.append(gated(experts, x, *matrices, biases))
    outs = jnp.stack(outs)
    y = sum(
        weights[:, place, None] * outs[ids[:, place], rows[:, 0]]
        for place in range(ids.shape[1])
    )
    if experts.shared_d_ff:
        plain = Experts(1, 1, 1)
        matrices = (params[f"shared_{name}"] for name in ("gate", "up", "down"))
        shared = gated(plain, x, *matrices)
        if experts.shared_gate:
            logit = x @ params["shared_router"]
            shared = shared / (1 + jnp.exp(-logit))[:, None]
        y = y + jnp.where(real[:, None], shared, 0)
    tokens = real.sum()
    probabilities = scores / jnp.sum(scores, -1, keepdims=True)
    means = jnp.sum(jnp.where(real[:, None], probabilities, 0), 0) / tokens
    counts = np.bincount(ids[real].ravel(), minlength=experts.num_experts)
    fractions = counts / (tokens * experts.experts_per_token)
    balance = experts.num_experts * jnp.sum(jnp.asarray(fractions) * means)
    squares = jax.nn.logsumexp(logits, axis=-1) ** 2
    return y, balance, jnp.sum(jnp.where(real, squares, 0)) / tokens
