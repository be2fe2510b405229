"""Peak memory of a training step on one device, by part.

It models the program that `train` compiles: the stored parameters and two moments;
their copy in the computation's dtype and its gradients; what layers keep for the
backward pass; and transient arrays. The transients belong to one layer's backward, the
loss, the embedding's gradient, or the update, whichever moment has the highest total.
The compiler decides how much one layer's backward needs (`layer_memory.py`), so the
numbers of arrays in `arrays.py` are estimates. `benchmarks/plan_bytes.py` compares the
total with compiled programs, whose recorded bytes are in the repository
(`docs/planning.md` reports the accuracy).
"""

import dataclasses
from collections.abc import Iterator

from usp_jax.models.decoder import counts_of
from usp_jax.models.segments import segments
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.layer_memory import arrays_of, kept, transient
from usp_jax.plan.parameter_traffic import gradient_itemsize
from usp_jax.plan.share import (
    ADAPTER_BYTES,
    LayerSizes,
    adapter_sizes,
    all_layer_sizes,
    end_tokens_of,
    expert_sizes,
    has_experts,
    layers_of,
    loss_blocks,
    matrix_bytes,
    microbatch_of,
    runs_of,
    tokens_of,
    trained_numbers,
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device's memory, by part.

    Attributes:
      state: stored parameters and two float32 moments of those that are trained, and
        the batch.
      weights: parameters in the computation's dtype.
      gradients: gradients of `weights`.
      activations: arrays that all layers keep for the backward pass.
      transient: peak of the short-lived arrays.
    """

    state: int | float
    weights: int | float
    gradients: int | float
    activations: int | float
    transient: int | float

    @property
    def peak(self) -> int | float:
        """Sum of all parts."""
        return (
            self.state
            + self.weights
            + self.gradients
            + self.activations
            + self.transient
        )


def step_memory(job: Job, choice: Choice) -> Memory:
    """Returns a device's memory at the peak of a training step."""
    return max(_moments(job, choice), key=lambda memory: memory.peak)


def host_bytes(job: Job, choice: Choice) -> int | float:
    """Returns the bytes that a device keeps in the host's memory."""
    activations = host_activations(job, choice)
    sizes = _Sizes.of(job, choice)
    return activations + sizes.stored(job) * choice.offload


def host_activations(job: Job, choice: Choice) -> int | float:
    """Returns the bytes that a device's layers keep in the host's memory."""
    if not choice.remat.endswith("_offload"):
        return 0
    return sum([runs_of(kind, choice) * kept(kind, choice) for kind in job.kinds])


def _moments(job: Job, choice: Choice) -> Iterator[Memory]:
    """Yields a device's memory at each moment that may be the peak."""
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
    layer = max([transient(kind, choice) for kind in job.kinds]) + _belt(job, choice)
    yield Memory(state, weights, gradients, activations, layer)
    if job.model.lora is None:
        yield Memory(state, 0, gradients, 0, _embedding(job, choice))
    update = 4 * sizes.trained
    if choice.offload:
        # One layer is fetched while another is updated and a third is sent back.
        update += 3 * sizes.stored(job) / layers_of(job, choice)
        yield Memory(state, whole, 0, 0, job.stored_itemsize * sizes.numbers)
    yield Memory(state, 0, 0, 0, update)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes of a device's parameters and their copies.

    Attributes:
      numbers: number of stored parameters, without adapters.
      trained: number of stored parameters that are trained: those of adapters, if any.
      layers_copy: bytes of the layers' matrices in the computation's dtype.
      output_copy: bytes of the output matrix in the computation's dtype.
      layers_gradient: bytes of the gradient of `layers_copy`.
      output_gradient: bytes of the gradient of `output_copy`.
    """

    numbers: int | float
    trained: int | float
    layers_copy: int | float
    output_copy: int | float
    layers_gradient: int | float
    output_gradient: int | float

    @classmethod
    def of(cls, job: Job, choice: Choice) -> "_Sizes":
        model, size = job.model, job.itemsize
        output = model.vocab_size * model.d_model / choice.tensor
        lora = model.lora is not None
        # A tied embedding is stored once, but its output matrix is a separate copy.
        tables = output * (1 if model.tie_embeddings else 2) + model.d_model
        numbers = tables / (choice.pipe * choice.everyone)
        copies, shared = 1, 1
        if choice.zero == 3:
            copies, shared = choice.split, choice.pipe
        # Parameters in the computation's dtype are their own copy, unless it is
        # gathered over data.
        same, output = model.dtype == model.stored_dtype, output / (copies * shared)
        gradient = gradient_itemsize(job, choice)
        copy = summed = 0.0
        for own, apart in _layers(job, choice):
            # ZeRO does not split experts over the axes over which they are spread.
            everyone = choice.everyone // apart
            parts = choice.split // apart if choice.zero == 3 else 1
            split = own.matrices + own.precise
            numbers += (split + own.norms) / everyone + own.whole + own.per_head
            if not (same and everyone == parts and choice.pipe == 1):
                copy += matrix_bytes(job, own) / parts
            # A stage sums its micro-batches' gradients in float32.
            each = gradient if choice.pipe == 1 else size + 4
            summed += (each * own.matrices + 4 * own.precise) / parts
        output_copy = 0 if same and choice.everyone == copies else size * output
        if not lora:
            return cls(numbers, numbers, copy, output_copy, summed, gradient * output)
        # Adapters are gathered in float32, and so are their gradients.
        own = all_layer_sizes(job, choice, adapter_sizes)
        whole = 4 * (own.norms + own.whole + own.per_head)
        learnt = trained_numbers(job, choice)
        return cls(numbers, learnt, copy + whole, output_copy, whole, 0)

    def stored(self, job: Job) -> int | float:
        """Bytes of the parameters and of the two moments of those that are trained."""
        if job.model.lora is None:
            return job.state_itemsize * self.numbers
        return job.stored_itemsize * self.numbers + ADAPTER_BYTES * self.trained


def _layers(job: Job, choice: Choice) -> Iterator[tuple[LayerSizes, int]]:
    """Yields sizes of all layers, and the devices along axes that ZeRO leaves out."""
    yield all_layer_sizes(job, choice), 1
    if has_experts(job):
        yield all_layer_sizes(job, choice, expert_sizes), choice.expert_shards


def _state(job: Job, choice: Choice, sizes: _Sizes) -> int | float:
    """Bytes that live from step to step, and of gradient sums over a step's parts."""
    tokens = choice.accumulate * end_tokens_of(job, choice)
    # The gradients of a step's parts are summed in float32.
    parts = 4 * (choice.accumulate > 1) * sizes.trained
    state = 0 if choice.offload else sizes.stored(job)
    return state + parts + 3 * 4 * tokens


def _activations(job: Job, choice: Choice) -> int | float:
    """Bytes that all layers keep on the device for the backward pass."""
    if choice.remat.endswith("_offload"):
        return arrays_of(job).fetched * max([kept(kind, choice) for kind in job.kinds])
    total = arrays_of(job).period * _period(job, choice)
    for kind in job.kinds:
        runs = runs_of(kind, choice)
        # A tick's arrays are assembled before they are copied next to other ticks'.
        tick = 0 if choice.pipe == 1 else runs // choice.pipeline.ticks
        total += (runs + tick) * kept(kind, choice)
    return total


def _period(job: Job, choice: Choice) -> int | float:
    """Bytes that a period of a stage's layers keeps; 0 if none is repeated.

    A period's layers run in loops inside a loop: what they keep is assembled for one
    period, then copied next to that of the others, and back again.
    """
    model = job.model
    if len(job.kinds) == 1:
        return 0
    kinds = dict(zip(counts_of(model), job.kinds, strict=True))
    layers = model.kinds[: model.num_layers // (choice.pipe * choice.interleave)]
    sizes = [
        sum([run.count * kept(kinds[run.kind], choice) for run in segment.runs])
        for segment in segments(layers)
        if segment.repeats > 1
    ]
    return max(sizes, default=0)


def _belt(job: Job, choice: Choice) -> int | float:
    """Bytes of a pipeline's waiting rows, belt and ring, and of their gradients."""
    if choice.pipe == 1:
        return 0
    x = job.model.d_model * job.itemsize / choice.token_shards
    waiting = end_tokens_of(job, choice) * x
    return 2 * (waiting + 2 * microbatch_of(job, choice) * x)


def _loss(job: Job, choice: Choice) -> int | float:
    """Transient bytes of the loss: a block of the output matrix, a tile of logits."""
    model, tokens = job.model, end_tokens_of(job, choice)
    block = model.vocab_size / choice.tensor / loss_blocks(job, choice)
    matrix = block * model.d_model * (job.itemsize + 4 * (model.lora is None))
    tile = 3 * 4 * min(model.loss_chunk, tokens) * block
    dx = tokens * model.d_model * (2 * job.itemsize + 4)
    return matrix + tile + dx


def _embedding(job: Job, choice: Choice) -> int:
    """Transient bytes of the embedding's gradient, in float32.

    A device has its slice of D for all devices' tokens.
    """
    tokens = end_tokens_of(job, choice)
    return tokens * job.model.d_model * (2 * job.itemsize + 4)
