"""The chunk contract: the four functions that every implementation provides.

    run(tokens, state) -> out, state, kept
    map_of(tokens) -> Map
    run_backward(tokens, kept, dout, dstate) -> gradients of the tokens, dstate
    adjoint(tokens, dout) -> dstate

A row is one chunk of one batch row, Z rows in all, and starts with a state of its own.
The state of a head is [H, V], and a chunk acts on it as an affine map:
state -> a · state + b. `run` also returns what it keeps for `run_backward`: the states
at the start of each segment of the chunk. `adjoint` is the gradient of the incoming
state for a dstate of 0, so that dstate -> aᵀ · dstate + adjoint is the whole gradient.

n = heads of q and k, g = heads of v for each of them. States, gates and gradients are
float32, or float64 for float64 inputs; `out` has the dtype of q, k and v. A token that
changes nothing has k = v = beta = log_decay = 0.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from usp_jax.checks import check_positive_int

State = Float[Array, "Z n g H V"]
# jax puts arrays, tracers, shapes or None into the leaves of a pytree.
Leaf = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaTokens:
    """The tokens of some chunks, or the gradients of their floating arrays.

    Attributes:
      q, k: [Z, L, n, H].
      v: [Z, L, n, g, V].
      log_decay, beta: [Z, L, n, g]; the decays are at most 0.
      starts: bool [Z, L], True where a document starts, at which the state before is
        dropped; None if no document starts.
    """

    q: Leaf
    k: Leaf
    v: Leaf
    log_decay: Leaf
    beta: Leaf
    starts: Leaf = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Map:
    """The affine maps of some chunks: state -> a · state + b.

    Attributes:
      a: [..., H, H].
      b: [..., H, V].
    """

    a: Leaf
    b: Leaf


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How a chunk is cut: into blocks of tokens, and segments of blocks.

    Attributes:
      block: tokens in a block, a power of two and at least 8.
      blocks: blocks in a segment; a state is kept for each segment.
      exact: if True, products are computed in the full precision of float32; else
        matrix units may round their factors to 16 bits.
    """

    block: int = 64
    blocks: int = 16
    exact: bool = True

    def __post_init__(self) -> None:
        check_positive_int("blocks", self.blocks)
        check_positive_int("block", self.block)
        if self.block < 8 or self.block & (self.block - 1):
            raise ValueError(f"block={self.block} must be a power of two, 8 or more")

    def of_length(self, length: int) -> "Tiles":
        """The tiles of a chunk, not much larger than the chunk."""
        block = min(self.block, max(8, 1 << (length - 1).bit_length()))
        blocks = -(-length // block)
        segments = -(-blocks // self.blocks)
        return dataclasses.replace(self, block=block, blocks=-(-blocks // segments))

    @property
    def segment(self) -> int:
        """Number of tokens in a segment."""
        return self.block * self.blocks


@runtime_checkable
class Run(Protocol):
    """Runs chunks from their states: (out [Z, L, n, g, V], state, kept)."""

    def __call__(
        self, tokens: DeltaTokens, state: jax.Array, tiles: Tiles
    ) -> tuple[jax.Array, jax.Array, jax.Array]: ...


@runtime_checkable
class MapOf(Protocol):
    """Computes the maps of chunks."""

    def __call__(self, tokens: DeltaTokens, tiles: Tiles) -> Map: ...


@runtime_checkable
class RunBackward(Protocol):
    """The gradients of the tokens and of the incoming states, for `dout`, `dstate`."""

    def __call__(
        self,
        tokens: DeltaTokens,
        kept: jax.Array,
        dout: jax.Array,
        dstate: jax.Array,
        tiles: Tiles,
    ) -> tuple[DeltaTokens, jax.Array]: ...


@runtime_checkable
class Adjoint(Protocol):
    """The gradients of the incoming states for `dout`, and none of the states after."""

    def __call__(
        self, tokens: DeltaTokens, dout: jax.Array, tiles: Tiles
    ) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class DeltaChunk:
    """One implementation of the contract."""

    run: Run
    map_of: MapOf
    run_backward: RunBackward
    adjoint: Adjoint
