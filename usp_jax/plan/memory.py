"""What a step keeps in a device's memory, by part, at its fullest.

Of the program that `train` compiles (ZeRO-3): the float32 parameters and two moments;
their copy in the computation's dtype and its gradients; what layers keep for the
backward pass; and the most that is needed for a while: for one layer's backward, for
the loss, for the embedding's gradient, or for the update. How much one layer's backward
needs is the compiler's affair: the numbers of arrays in `LAYER` are estimates.
`benchmarks/plan_bytes.py` compares the whole with compiled programs: three have been so
far, and the estimate is at most 9 % low (`docs/planning.md`).
"""

import dataclasses

from usp_jax.plan.attention import Call
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.flops import layer_weights
from usp_jax.plan.traffic import call_of, layers_of, loss_blocks, tokens_of


@dataclasses.dataclass(frozen=True)
class Arrays:
    """How many arrays of a device's tokens one layer's backward has at its fullest.

    Attributes:
      narrow: of the model size.
      wide: of the feed-forward size.
    """

    narrow: int | float
    wide: int | float


LAYER = Arrays(narrow=6, wide=5)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      state: float32 parameters and two moments, and the batch.
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
        return sum(dataclasses.astuple(self))


def step_memory(job: Job, choice: Choice) -> Memory:
    """The memory of a step."""
    model = job.model
    matrices = _matrices(job, choice)
    table = model.vocab_size * model.d_model / choice.tensor
    norms = (2 * layers_of(job, choice) + 1) * model.d_model
    # A tied embedding is a parameter once, and a matrix of its own beside it.
    tables = 0 if model.tie_embeddings else table
    numbers = (matrices + tables + norms * choice.tensor) / choice.everyone
    tokens = choice.accumulate * tokens_of(job, choice)
    # The gradients of a step's parts are added up in float32.
    state = (12 + 4 * (choice.accumulate > 1)) * numbers + 3 * 4 * tokens
    if choice.zero == 1:
        copies, gradient = 1, choice.gradient_itemsize or job.itemsize
    else:
        copies, gradient = choice.split, job.itemsize
    # In float32 the parameters are their own copy, unless it is gathered over data.
    own = job.itemsize == 4 and choice.everyone == copies
    weights = 0 if own else job.itemsize * matrices / copies
    gradients = gradient * matrices / copies
    activations = layers_of(job, choice) * kept(job, choice)
    moment = _moment(job, choice)
    # The update comes when activations and the copy's gradients are gone.
    update = 4 * numbers - activations - gradients
    return Memory(state, weights, gradients, activations, max(moment, update))


def kept(job: Job, choice: Choice) -> int | float:
    """Bytes that one layer keeps for its backward pass, beside its weights."""
    model, tokens, size = job.model, tokens_of(job, choice), job.itemsize
    call = call_of(job, choice)
    x = tokens * model.d_model * size
    if choice.tensor_sequence:
        x /= choice.tensor
    seen = call.q_elements * size + 4 * call.lse_elements
    q_and_kv = (call.q_elements + call.kv_elements) * size
    result = _result(call, size)
    if choice.remat == "full":
        return x
    if choice.remat == "attention":
        return x + seen
    if choice.remat == "attention_qkv":
        return x + seen + q_and_kv + result
    wide = tokens * model.d_ff * size / choice.tensor
    if choice.tensor_sequence:
        # A program that fuses norms and gates: both inputs and outputs of the norms.
        return 4 * x + seen + q_and_kv + 3 * wide
    # Norms keep float32; the gate, its sigmoid and two products.
    return 2 * x + 16 * tokens * model.d_model + seen + q_and_kv + result + 5 * wide


def _matrices(job, choice):
    """Numbers of a device's layers and output matrix, before ZeRO."""
    model = job.model
    layers = layers_of(job, choice) * layer_weights(model)
    return (layers + model.vocab_size * model.d_model) / choice.tensor


def _result(call: Call, size):
    """Attention's output once more, on the other side of the all-to-all."""
    return call.q_elements * size if call.ulysses > 1 else 0


def _moment(job, choice):
    """The largest of what the parts of a step need for a while."""
    if choice.tensor_sequence:
        # A program with whole float32 logits, and their gradients in 16 bits.
        tokens = tokens_of(job, choice)
        return 6 * tokens * job.model.vocab_size / choice.tensor
    return max(_layer(job, choice), _loss(job, choice), _embedding(job, choice))


def _layer(job, choice):
    """One layer's backward: weights, their gradients, and activations."""
    model, tokens, size = job.model, tokens_of(job, choice), job.itemsize
    call = call_of(job, choice)
    weights = layer_weights(model) * size / choice.tensor if choice.split > 1 else 0
    gathered = weights + layer_weights(model) * size / choice.tensor
    narrow = LAYER.narrow * tokens * model.d_model * size
    wide = LAYER.wide * tokens * model.d_ff * size / choice.tensor
    # q, out and their gradients, dq in float32; k, v twice, and dk, dv in float32.
    heads = 4 * call.q_elements * size + 4 * call.q_elements
    rotating = 2 * call.kv_elements * size + 2 * 4 * call.kv_elements
    return gathered + max(narrow + wide, narrow + heads + rotating)


def _loss(job, choice):
    """The loss's backward: a block of the output matrix, and a tile of logits."""
    model, tokens = job.model, tokens_of(job, choice)
    block = model.vocab_size / choice.tensor / loss_blocks(job, choice)
    matrix = block * model.d_model * (job.itemsize + 4)
    tile = 3 * 4 * min(model.loss_chunk, tokens) * block
    dx = tokens * model.d_model * (2 * job.itemsize + 4)
    return matrix + tile + dx


def _embedding(job, choice):
    """Its gradient: what all devices' tokens have of this device's slice, float32."""
    tokens = tokens_of(job, choice)
    return tokens * job.model.d_model * (2 * job.itemsize + 4)
