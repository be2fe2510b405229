"""Traffic of parameters: gathers of weights, and scatters and sums of gradients."""

import dataclasses
import functools
from collections.abc import Iterator

from usp_jax.models.pipeline import deal_tables
from usp_jax.plan.choice import Choice, Job
from usp_jax.plan.share import (
    SizesOf,
    adapter_sizes,
    all_layer_sizes,
    expert_sizes,
    has_experts,
    layer_sizes,
    loss_blocks,
    matrix_bytes,
    runs_of,
)
from usp_jax.plan.transfer import (
    ALL_AXES,
    END_AXES,
    END_ZERO_AXES,
    ZERO_AXES,
    Transfer,
    along,
    gathered,
)


def gathered_once(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Gathers done once per step: norms, ZeRO-1's and `data`'s, and a single block."""
    gather = "all-gather"
    for sizes in _weights(job, choice):
        axes = sizes.axes(ALL_AXES)
        yield gathered("weights", gather, choice, axes, 1, sizes.norms)
        if choice.zero == 1:
            yield gathered("weights", gather, choice, axes, 1, sizes.layers)
        else:
            split = sizes.layers / sizes.shards(choice, ZERO_AXES)
            yield gathered("weights", gather, choice, ("data",), 1, split)
        yield _dealt("weights", choice, sizes)
    yield gathered("weights", gather, choice, END_AXES, 1, _final_norm(job))
    output = _output(job, choice)
    if choice.zero == 1:
        yield gathered("weights", gather, choice, END_AXES, 1, output)
        return
    split = output / (choice.split * choice.pipe)
    yield gathered("weights", gather, choice, ("data",), 1, split)
    if loss_blocks(job, choice) == 1:
        yield gathered("weights", gather, choice, END_ZERO_AXES, 1, output)


def parameters(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Gathers of weights layer by layer, and scatters and sums of gradients."""
    yield from _layers(job, choice)
    yield from _ends(job, choice)
    if choice.program == "train":
        yield from _apart(job, choice)


def _layers(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Gathers of layers' weights one layer at a time, and sums of their gradients."""
    ratio = gradient_itemsize(job, choice) / job.itemsize
    gather, scatter, total = "all-gather", "reduce-scatter", "all-reduce"
    for sizes in _weights(job, choice):
        axes = sizes.axes(ALL_AXES)
        if sizes.trained:
            yield gathered("gradients", scatter, choice, axes, 1, sizes.norms)
            yield gathered("gradients", total, choice, axes, 1, 2 * sizes.whole)
            yield _dealt("gradients", choice, sizes)
        if choice.zero == 1:
            if not sizes.trained:
                continue
            layers = ratio * sizes.layers
            yield gathered("gradients", scatter, choice, axes, 1, layers)
            continue
        if sizes.trained:
            split = sizes.layers / sizes.shards(choice, ZERO_AXES)
            yield gathered("gradients", scatter, choice, ("data",), 1, split)
        axes = sizes.axes(ZERO_AXES)
        for kind in job.kinds:
            runs = runs_of(kind, choice)
            layer = matrix_bytes(job, sizes.of(kind, choice))
            yield gathered("weights", gather, choice, axes, 2 * runs, layer)
            if sizes.trained:
                yield gathered("gradients", scatter, choice, axes, runs, layer)


def _ends(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Gathers of the output matrix, and sums of its gradient and the final norm's."""
    gather, scatter = "all-gather", "reduce-scatter"
    output, blocks = _output(job, choice), loss_blocks(job, choice)
    if choice.zero == 3 and blocks > 1:
        block, axes = output / blocks, END_ZERO_AXES
        yield gathered("weights", gather, choice, axes, 2 * blocks, block)
    if job.model.lora is not None:
        return
    yield gathered("gradients", scatter, choice, END_AXES, 1, _final_norm(job))
    if choice.zero == 1:
        output *= gradient_itemsize(job, choice) / job.itemsize
        yield gathered("gradients", scatter, choice, END_AXES, 1, output)
        return
    split = output / (choice.split * choice.pipe)
    yield gathered("gradients", scatter, choice, ("data",), 1, split)
    block = output / blocks
    yield gathered("gradients", scatter, choice, END_ZERO_AXES, blocks, block)


def _apart(job: Job, choice: Choice) -> Iterator[Transfer]:
    """Sums along tensor of gradients of weights that it does not split."""
    total, tensor = "all-reduce", ("tensor",)
    if job.model.lora is not None:
        # Each device has computed its own heads or features from an adapter's product.
        sizes = all_layer_sizes(job, choice, adapter_sizes)
        unsplit = 4 * (sizes.norms + sizes.per_head)
        yield gathered("gradients", total, choice, tensor, 1, 2 * unsplit)
        return
    # Each device along tensor has applied these to its own heads, or tokens.
    apart: int | float = _final_norm(job) * choice.tensor_sequence
    for weights in _weights(job, choice):
        apart += weights.per_head + weights.norms * choice.tensor_sequence
    yield gathered("gradients", total, choice, tensor, 1, 2 * apart)
    for kind in job.kinds:
        # These are applied to all tokens, for a part of the heads or features.
        sizes = layer_sizes(kind, choice)
        unsplit = sizes.unsplit * job.itemsize + sizes.precise * max(4, job.itemsize)
        runs = runs_of(kind, choice)
        yield gathered("gradients", total, choice, tensor, runs, 2 * unsplit)


def gradient_itemsize(job: Job, choice: Choice) -> int:
    """Returns the bytes per element of gradients when summed over devices."""
    return 4 if choice.program == "megatron" else job.itemsize


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Bytes of a device's weights when gathered: small ones in float32, and matrices.

    Attributes:
      norms: bytes of the layers' norms that ZeRO splits.
      whole: bytes of the layers' norms and biases that ZeRO does not split.
      per_head: bytes of those of `whole` that devices along tensor share.
      layers: bytes of the layers' matrices.
      trained: whether they have gradients.
      apart: axes over which nothing is gathered: the expert axes, for experts.
      of: the sizes of one layer.
    """

    norms: int | float
    whole: int | float
    per_head: int
    layers: int | float
    trained: bool
    apart: tuple[str, ...]
    of: SizesOf

    @classmethod
    def of_layers(
        cls, job: Job, choice: Choice, of: SizesOf, apart: tuple[str, ...] = ()
    ) -> "_Weights":
        sizes = all_layer_sizes(job, choice, of)
        return cls(
            norms=4 * sizes.norms,
            whole=4 * (sizes.whole + sizes.per_head),
            per_head=4 * sizes.per_head,
            layers=matrix_bytes(job, sizes),
            trained=job.model.lora is None or of is adapter_sizes,
            apart=apart,
            of=of,
        )

    def axes(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of some axes over which these weights are gathered."""
        return tuple([name for name in names if name not in self.apart])

    def shards(self, choice: Choice, names: tuple[str, ...]) -> int:
        """The number of devices along `axes(names)`."""
        return along(choice, self.axes(names))[1]


def _weights(job: Job, choice: Choice) -> list[_Weights]:
    """The weights of all layers: of experts and adapters, if any, and of all else."""
    found = [_Weights.of_layers(job, choice, layer_sizes)]
    if has_experts(job):
        apart = choice.expert_axes
        found.append(_Weights.of_layers(job, choice, expert_sizes, apart))
    if job.model.lora is not None:
        found.append(_Weights.of_layers(job, choice, adapter_sizes))
    return found


def _final_norm(job: Job) -> int:
    """Bytes of the final norm when gathered."""
    return 4 * job.model.d_model


def _output(job: Job, choice: Choice) -> int | float:
    """Bytes of the output matrix when gathered."""
    return job.model.vocab_size * job.model.d_model * job.itemsize / choice.tensor


def _dealt(what: str, choice: Choice, sizes: _Weights) -> Transfer:
    """Sends a stage's layers to the stages that use them, with several rounds."""
    times = dealing_turns(choice.pipe, choice.interleave)
    shards = sizes.shards(choice, ALL_AXES)
    layers = (sizes.norms + sizes.layers) / shards + sizes.whole
    sent = layers / choice.interleave
    return Transfer(what, "collective-permute", ("pipe",), times, sent)


@functools.cache
def dealing_turns(stages: int, rounds: int) -> int:
    """Returns the number of turns of `Pipeline.deal` that send anything."""
    if rounds == 1:
        return 0
    kept, _ = deal_tables(stages, rounds)
    users = [
        [(device * rounds + group) % stages for group in groups]
        for device, groups in enumerate(kept.T.tolist())
    ]
    return sum(
        any(users[device][turn] != device for device in range(stages))
        for turn in range(rounds)
    )
