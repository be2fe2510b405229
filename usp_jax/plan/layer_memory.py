"""Bytes of one layer: what it keeps for its backward, and what that needs meanwhile."""

import dataclasses

from usp_jax.models.moe.exchange import OUT, ROWS
from usp_jax.models.moe.plan import PLAN
from usp_jax.models.remat import keeps
from usp_jax.plan.arrays import GPU, TPU, Arrays
from usp_jax.plan.attention import Call
from usp_jax.plan.choice import Choice, Job, halo_of_layer
from usp_jax.plan.delta_layers import kept_of_delta, transient_of_delta
from usp_jax.plan.share import (
    call_of,
    expert_sizes,
    has_out_norms,
    inner_size,
    is_tiled,
    kept_of,
    layer_sizes,
    matrix_bytes,
    microbatch_of,
    round_rows,
    rows_of,
)

LANES = 128
"""Multiple to which a TPU pads the last dim of an array, here the head size."""


def kept(job: Job, choice: Choice) -> int | float:
    """Returns the bytes one layer keeps for its backward, on the device or the host.

    Args:
      job: the job of one kind of layers, from `Job.kinds`.
      choice: how it is split and computed.
    """
    model, tokens, size = job.model, microbatch_of(job, choice), job.itemsize
    call = call_of(job, choice)
    narrow = tokens * model.d_model
    x = narrow * size / choice.token_shards
    of_attention = _kept_of_attention(job, choice)
    policy, of_experts = kept_of(choice), _kept_of_experts(job, choice)
    if policy in ("full", "attention", "attention_qkv"):
        return x + of_attention + of_experts
    wide = tokens * inner_size(job) * size / choice.tensor
    if policy == "dots":
        inner = 2 * wide * (not is_tiled(job, choice)) + of_experts
        normed = _normed(job, choice, call) * size
        # The inputs of norms after the two parts of the layer.
        outs = 2 * x * has_out_norms(job)
        return 2 * x + outs + normed + of_attention + inner
    if choice.program == "megatron":
        # Inputs and outputs of both norms, and those of the gate.
        return 4 * x + of_attention + 3 * wide
    # Norms keep float32; the gate, its sigmoid and its products are kept. Attention's
    # output is kept in two orders of its dims.
    norms = 5 * 4 * narrow / choice.token_shards
    wide *= 6 if choice.mlp_tile is None else 0
    wide += of_experts
    return 2 * x + norms + of_attention + call.out_elements * size + wide


def _normed(job: Job, choice: Choice, call: Call) -> int | float:
    """Elements of what norms, gates or a convolution in the mixer are applied to."""
    model = job.model
    if (delta := model.delta) is not None:
        gate = delta.value_heads * delta.value_size
        each = delta.channels + gate + 2 * delta.value_heads
        return microbatch_of(job, choice) * each / choice.tensor
    if model.latent is not None:
        latents = (model.latent.q_rank or 0) + (call.latent_size or 0)
        return microbatch_of(job, choice) * latents
    if model.qk_norm or model.whole_qk_norm:
        gate = call.out_elements * model.output_gate
        return call.q_elements + call.kv_elements / 2 + gate
    return 0


def _kept_of_experts(job: Job, choice: Choice) -> int | float:
    """Bytes kept of a layer's experts: the first round, and the sums of outputs."""
    experts = job.model.experts
    if experts is None:
        return 0
    policy, d_model = kept_of(choice), job.model.d_model
    hidden = 2 * experts.d_expert / choice.tensor
    # The token's experts; the plan of the exchange; the router's float32 scores.
    each = 4 * experts.experts_per_token * (1 + 3 * keeps(policy, PLAN))
    each += 4 * 3 * experts.num_experts * (policy == "none")
    each += d_model * job.itemsize * keeps(policy, OUT)
    rows = round_rows(job, choice) * keeps(policy, ROWS)
    return microbatch_of(job, choice) * each + rows * (d_model + hidden) * job.itemsize


def _kept_of_attention(job: Job, choice: Choice) -> int:
    """Bytes kept of a mixer.

    Of attention: out and lse, or also q, k, v and out in both splits.
    """
    policy, size, call = kept_of(choice), job.itemsize, call_of(job, choice)
    if policy == "full":
        return 0
    if job.model.delta is not None:
        return kept_of_delta(job, choice)
    # In the kernel's format, padded on TPU.
    seen = _padded(job, call).out_elements * size + 4 * call.lse_elements
    if policy == "attention":
        return seen
    again = call.ulysses > 1 and choice.program == "train"
    kv = call.kv_elements + _halo_elements(job, choice, call)
    return seen + (call.q_elements + again * call.out_elements + kv) * size


def _halo_elements(job: Job, choice: Choice, call: Call) -> int:
    """Elements of k and v together that a layer's call receives in a halo."""
    if job.model.window is None or (halo := halo_of_layer(job, choice)) is None:
        return 0
    tokens = rows_of(job, choice) * halo.length
    return 2 * tokens * call.num_kv_heads * call.head_size


def transient(job: Job, choice: Choice) -> int | float:
    """Returns transient bytes of a backward: weights, gradients and activations."""
    arrays = arrays_of(job)
    model, tokens, size = job.model, microbatch_of(job, choice), job.itemsize
    call = _padded(job, call_of(job, choice))
    gathered = 0.0
    for of, apart in ((layer_sizes, 1), (expert_sizes, choice.expert_shards)):
        whole = matrix_bytes(job, of(job, choice))
        is_gathered = choice.zero == 3 and choice.split > apart
        gathered += whole * (arrays.weights if is_gathered else 1)
    # With TP-sp, these arrays are gathered, and not yet scattered.
    narrow = arrays.narrow * tokens * model.d_model * size
    tile = min(tokens, choice.mlp_tile or tokens)
    wide = arrays.wide * tile * inner_size(job) * size / choice.tensor
    if tile < tokens and model.lora is None:
        # Gradients are summed over the tiles in float32.
        wide += 4 * 3 * model.d_model * inner_size(job) / choice.tensor
    wide += _experts(job, choice)
    heads = _mixer(job, choice, call)
    if choice.remat.endswith("_offload"):
        heads += arrays.early * _kept_of_attention(job, choice)
    return gathered + narrow + max(wide, heads)


def _mixer(job: Job, choice: Choice, call: Call) -> int | float:
    """Transient bytes of a layer's attention or delta rule."""
    arrays, size = arrays_of(job), job.itemsize
    if job.model.delta is not None:
        return transient_of_delta(job, choice)
    # q and out, on both sides of the all-to-alls; dq, which a ring sums in float32.
    sides, both = 1 + (call.ulysses > 1), call.q_elements + call.out_elements
    heads: int | float = sides * both * size
    # k, v made of a latent, and float32 dk, dv.
    heads += call.expanded_elements * (size + 4)
    if (halo := _halo_elements(job, choice, call)) > 0:
        # k, v and float32 dk, dv of a device's tokens and their halo, side by side.
        heads += (call.kv_elements + halo) * (size + 4)
    # Further shards of a group ("unidirectional:4") are not counted. On a ring of 8
    # H100s they leave the temporary bytes of both passes at 289 MiB with 16 query and 4
    # key heads, and raise them from 770 to 897 MiB with 16 key heads (8K tokens each).
    if call.ring > 1:
        heads += 4 * call.q_elements
        heads += arrays.rotating * 2 * call.kv_elements * (size + 4)
    return heads


def _experts(job: Job, choice: Choice) -> int | float:
    """Transient bytes of the exchange and the products of a layer's experts."""
    model, arrays = job.model, arrays_of(job)
    if model.experts is None:
        return 0
    rows, hidden = round_rows(job, choice), model.experts.d_expert / choice.tensor
    each = arrays.rows * model.d_model + arrays.hidden * hidden
    # Gradients are summed over the rounds in float32.
    sums = 4 * arrays.sums * expert_sizes(job, choice).matrices
    return rows * each * job.itemsize + sums


def arrays_of(job: Job) -> Arrays:
    """Returns the numbers of arrays that the compiler of a job's machine needs."""
    return TPU if _is_tpu(job) else GPU


def _is_tpu(job: Job) -> bool:
    return job.machine.torus_dims > 0


def _padded(job: Job, call: Call) -> Call:
    """The call with the head sizes that its arrays have in memory."""
    if not _is_tpu(job):
        return call
    value_size = None if call.value_size is None else _lanes(call.value_size)
    return dataclasses.replace(
        call, head_size=_lanes(call.head_size), value_size=value_size
    )


def _lanes(size: int) -> int:
    return -(-size // LANES) * LANES
