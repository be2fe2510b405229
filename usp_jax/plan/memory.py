"""What a step keeps in a device's memory, by part, at its fullest.

Of the program that `train` compiles: the stored parameters and two moments; their copy
in the computation's dtype and its gradients; what layers keep for the backward pass;
and what is needed beside them for a while. That is one layer's backward, the loss, the
embedding's gradient, or the update: the fullest of these moments counts. How much one
layer's backward needs is the compiler's affair: the numbers of arrays in `GPU` and
`TPU` are estimates. `benchmarks/plan_bytes.py` compares the whole with compiled
programs, whose bytes are kept (`docs/planning.md` says how near it comes).
"""

import dataclasses
from collections.abc import Iterator

from usp_jax.plan.attention import Call
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.flops import layer_weights
from usp_jax.plan.traffic import (
    call_of,
    end_tokens_of,
    gradient_itemsize,
    is_tiled,
    kept_of,
    layers_of,
    loss_blocks,
    microbatch_of,
    runs_of,
    tokens_of,
)


@dataclasses.dataclass(frozen=True)
class Arrays:
    """How many arrays one layer's backward has at its fullest.

    Attributes:
      narrow: of a device's tokens and the model size.
      wide: of a device's tokens and the feed-forward size.
      weights: of the layer's matrices, whole.
      rotating: of k, v and of float32 dk, dv that a ring has on the way.
      fetched: of what a layer keeps, where that comes from the host's memory;
      early: and of attention's part of it, while its backward is at work.
    """

    narrow: int | float
    wide: int | float
    weights: int | float
    rotating: int | float
    fetched: int | float
    early: int | float


GPU = Arrays(narrow=7, wide=6, weights=2, rotating=1, fetched=1, early=0)
TPU = Arrays(narrow=6, wide=5, weights=1.5, rotating=1.5, fetched=3, early=2)
LANES = 128
"""What a TPU pads the last dim of an array to, the size of heads."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      state: stored parameters and two float32 moments, and the batch.
      weights: the parameters in the computation's dtype.
      gradients: of these.
      activations: what all layers keep for the backward pass.
      transient: the most that is needed beside them for a while.
    """

    state: int | float
    weights: int | float
    gradients: int | float
    activations: int | float
    transient: int | float

    @property
    def peak(self) -> int | float:
        """All of it."""
        return (
            self.state
            + self.weights
            + self.gradients
            + self.activations
            + self.transient
        )


def step_memory(job: Job, choice: Choice) -> Memory:
    """The memory of a step."""
    return max(_moments(job, choice), key=lambda memory: memory.peak)


def host_bytes(job: Job, choice: Choice) -> int | float:
    """What of a device's is in the host's memory."""
    kept_there = choice.remat.endswith("_offload")
    activations = runs_of(job, choice) * kept(job, choice) * kept_there
    numbers = _Sizes.of(job, choice).numbers
    return activations + job.state_itemsize * numbers * choice.offload


def _moments(job: Job, choice: Choice) -> Iterator[Memory]:
    """What there is when one thing or another has the most."""
    sizes = _Sizes.of(job, choice)
    weights, gradients = sizes.layers_copy, sizes.layers_gradient
    activations = _activations(job, choice)
    state = _state(job, choice, sizes)
    if choice.program == "megatron":
        # Whole float32 logits, and their gradients in 16 bits.
        logits = 6 * tokens_of(job, choice) * job.model.vocab_size / choice.tensor
        weights += sizes.output_copy
        gradients += sizes.output_gradient
        yield Memory(state, weights, gradients, activations, logits)
        return
    whole = weights + sizes.output_copy
    loss = _loss(job, choice)
    yield Memory(state, whole, sizes.output_gradient, activations, loss)
    gradients += sizes.output_gradient
    layer = _layer(job, choice) + _belt(job, choice)
    yield Memory(state, weights, gradients, activations, layer)
    yield Memory(state, 0, gradients, 0, _embedding(job, choice))
    update = 4 * sizes.numbers
    if choice.offload:
        # A layer comes while another is changed and one goes.
        update += 3 * job.state_itemsize * sizes.numbers / layers_of(job, choice)
        yield Memory(state, whole, 0, 0, job.stored_itemsize * sizes.numbers)
    yield Memory(state, 0, 0, 0, update)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of a device's parameters.

    Attributes:
      numbers: parameters.
      layers_copy, output_copy: bytes in the computation's dtype.
      layers_gradient, output_gradient: bytes of their gradients.
    """

    numbers: int | float
    layers_copy: int | float
    output_copy: int | float
    layers_gradient: int | float
    output_gradient: int | float

    @classmethod
    def of(cls, job: Job, choice: Choice) -> "_Sizes":
        model, size = job.model, job.itemsize
        layers = layers_of(job, choice) * layer_weights(model) / choice.tensor
        output = model.vocab_size * model.d_model / choice.tensor
        norms = 2 * layers_of(job, choice) * model.d_model
        # A tied embedding is a parameter once, and a matrix of its own beside it.
        tables = output * (1 if model.tie_embeddings else 2) + model.d_model
        numbers = (layers + norms + tables / choice.pipe) / choice.everyone
        copies, shared = 1, 1
        if choice.zero == 3:
            copies, shared = choice.split, choice.pipe
        layers, output = layers / copies, output / (copies * shared)
        gradient = gradient_itemsize(job, choice)
        # Parameters in the computation's dtype are their own copy, unless it is
        # gathered over data.
        own = model.dtype == model.stored_dtype and choice.everyone == copies
        return cls(
            numbers,
            0 if own and choice.pipe == 1 else size * layers,
            0 if own else size * output,
            # A stage adds its micro-batches' gradients up in float32.
            (gradient if choice.pipe == 1 else size + 4) * layers,
            gradient * output,
        )


def _state(job: Job, choice: Choice, sizes: _Sizes) -> int | float:
    """What is there before a step and after it, and sums over its parts."""
    tokens = choice.accumulate * end_tokens_of(job, choice)
    # The gradients of a step's parts are added up in float32.
    parts = 4 * (choice.accumulate > 1) * sizes.numbers
    state = 0 if choice.offload else job.state_itemsize * sizes.numbers
    return state + parts + 3 * 4 * tokens


def _activations(job: Job, choice: Choice) -> int | float:
    """What all layers keep on the device."""
    runs, one = runs_of(job, choice), kept(job, choice)
    if choice.remat.endswith("_offload"):
        return _arrays(job).fetched * one
    # What a tick keeps is put together before it is put beside that of other ticks.
    tick = 0 if choice.pipe == 1 else runs // choice.pipeline.ticks
    return (runs + tick) * one


def kept(job: Job, choice: Choice) -> int | float:
    """Bytes that one layer keeps for its backward pass, on the device or the host."""
    model, tokens, size = job.model, microbatch_of(job, choice), job.itemsize
    call = call_of(job, choice)
    narrow = tokens * model.d_model
    x = narrow * size / choice.token_shards
    of_attention = _kept_of_attention(job, choice)
    policy = kept_of(choice)
    if policy in ("full", "attention", "attention_qkv"):
        return x + of_attention
    wide = tokens * model.d_ff * size / choice.tensor
    if policy == "dots":
        inner = 2 * wide * (not is_tiled(job, choice))
        normed = (call.q_elements + call.kv_elements / 2) * size * model.qk_norm
        return 2 * x + normed + of_attention + inner
    if choice.program == "megatron":
        # Both inputs and outputs of the norms, and the gate's.
        return 4 * x + of_attention + 3 * wide
    # Norms keep float32; the gate, its sigmoid and products with it. Attention's output
    # is there in two orders of its dims.
    norms = 5 * 4 * narrow / choice.token_shards
    wide *= 6 if choice.mlp_tile is None else 0
    return 2 * x + norms + of_attention + call.q_elements * size + wide


def _kept_of_attention(job: Job, choice: Choice) -> int:
    """Its output and log-sum-exp; q, k, v and the output beyond the all-to-all."""
    policy, size, call = kept_of(choice), job.itemsize, call_of(job, choice)
    if policy == "full":
        return 0
    # As the kernel writes them.
    seen = _padded(job, call).q_elements * size + 4 * call.lse_elements
    if policy == "attention":
        return seen
    sides = 1 + (call.ulysses > 1 and choice.program == "train")
    return seen + (sides * call.q_elements + call.kv_elements) * size


def _layer(job: Job, choice: Choice) -> int | float:
    """One layer's backward: weights, their gradients, and activations."""
    arrays = _arrays(job)
    model, tokens, size = job.model, microbatch_of(job, choice), job.itemsize
    call = _padded(job, call_of(job, choice))
    whole = layer_weights(model) * size / choice.tensor
    gathered = whole * (arrays.weights if choice.zero == 3 and choice.split > 1 else 1)
    # With TP-sp they are gathered, and not yet scattered.
    narrow = arrays.narrow * tokens * model.d_model * size
    tile = min(tokens, choice.mlp_tile or tokens)
    wide = arrays.wide * tile * model.d_ff * size / choice.tensor
    if tile < tokens:
        # Gradients are added up over the tiles in float32.
        wide += 4 * 3 * model.d_model * model.d_ff / choice.tensor
    # q and out, on both sides of the all-to-alls; dq, which a ring adds up in float32.
    heads: int | float = (2 + 2 * (call.ulysses > 1)) * call.q_elements * size
    if choice.ring > 1:
        heads += 4 * call.q_elements
        heads += arrays.rotating * 2 * call.kv_elements * (size + 4)
    if choice.remat.endswith("_offload"):
        heads += arrays.early * _kept_of_attention(job, choice)
    return gathered + narrow + max(wide, heads)


def _arrays(job: Job) -> Arrays:
    return TPU if _is_tpu(job) else GPU


def _is_tpu(job: Job) -> bool:
    return job.machine.torus_dims > 0


def _padded(job: Job, call: Call) -> Call:
    """The call as its arrays lie in memory."""
    if not _is_tpu(job):
        return call
    return dataclasses.replace(call, head_size=-(-call.head_size // LANES) * LANES)


def _belt(job: Job, choice: Choice) -> int | float:
    """Of a pipeline: what comes, goes and waits, and their gradients."""
    if choice.pipe == 1:
        return 0
    x = job.model.d_model * job.itemsize / choice.token_shards
    waiting = end_tokens_of(job, choice) * x
    return 2 * (waiting + 2 * microbatch_of(job, choice) * x)


def _loss(job: Job, choice: Choice) -> int | float:
    """The loss's backward: a block of the output matrix, and a tile of logits."""
    model, tokens = job.model, end_tokens_of(job, choice)
    block = model.vocab_size / choice.tensor / loss_blocks(job, choice)
    matrix = block * model.d_model * (job.itemsize + 4)
    tile = 3 * 4 * min(model.loss_chunk, tokens) * block
    dx = tokens * model.d_model * (2 * job.itemsize + 4)
    return matrix + tile + dx


def _embedding(job: Job, choice: Choice) -> int:
    """Its gradient: what all devices' tokens have of this device's slice, float32."""
    tokens = end_tokens_of(job, choice)
    return tokens * job.model.d_model * (2 * job.itemsize + 4)
