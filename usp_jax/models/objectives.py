"""Objectives of a training step, as sums over rows that are divided by a count later.

Sums of parts of a batch can be added, so a mean does not depend on the parts.
"""

import dataclasses
from functools import partial
from typing import NamedTuple, NotRequired, Protocol, TypedDict, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from usp_jax.checks import check_positive_int
from usp_jax.models.config import LlamaConfig
from usp_jax.models.dpo import dpo_loss
from usp_jax.models.llama import Llama
from usp_jax.models.logprobs import logprobs, per_document
from usp_jax.models.lora import without_adapters
from usp_jax.models.loss import routed_loss
from usp_jax.models.optimizer import Params
from usp_jax.models.router_report import RouterReport
from usp_jax.models.weights import computed_dtype


class Batch(TypedDict):
    """Rows in stored order, split over a mesh: int32 [B, T].

    Attributes:
      tokens: token ids.
      labels: the token that follows each, or -1.
      segment_ids: the document of each token, -1 for padding; absent if each row is one
        sequence without padding.
      positions: positions of the tokens, for balanced rows, each of which is stored in
        its own order.
    """

    tokens: Array
    labels: Array
    segment_ids: NotRequired[Array]
    positions: NotRequired[Array]


class Sums(NamedTuple):
    """Sums over rows, on all devices.

    Attributes:
      loss: the sum whose mean is minimised, in nats.
      number: the number of its terms, int32: labels or pairs.
      others: further sums with as many terms, by the names of their metrics.
      report: the routers' report, if their losses are minimised too.
    """

    loss: Float[Array, ""]
    number: Int[Array, ""]
    others: dict[str, Array]
    report: RouterReport | None


@runtime_checkable
class Objective(Protocol):
    """The function that a step minimises."""

    def __call__(
        self, params: Params, part: Batch, reference: Params | None = None
    ) -> Sums:
        """Returns the sums over rows.

        Args:
          params: the model's parameters.
          part: the rows.
          reference: parameters of DPO's reference, from `reference_of`; None is the
            model without its adapters.
        """


@dataclasses.dataclass(frozen=True)
class DPO:
    """Direct preference optimization (`dpo.py`).

    The reference is the model without its adapters, or a copy of its initial weights.
    Documents 2i and 2i + 1 of a row are its pair i, the chosen answer first; labels are
    those of the answers.

    Attributes:
      beta: strength of the pull towards the reference.
      pairs: the largest number of pairs in a row. More make the loss NaN.

    Raises:
      ValueError: a value is not positive.
    """

    beta: float
    pairs: int

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be positive")
        check_positive_int("pairs", self.pairs)


DPO_METRICS = ("accuracy", "margin")
"""Metrics of DPO in addition to the loss; `dpo.DPOLoss` describes them."""


def objective_of(
    graphdef: nnx.GraphDef[Llama], layout: str, dpo: DPO | None = None
) -> Objective:
    """Returns the sums over rows that a step minimises.

    Args:
      graphdef: the model without its parameters.
      layout: the layout in which rows are stored.
      dpo: learn from pairs of answers; None learns the labels. The losses of routers
        are not part of DPO.
    """
    if dpo is None:
        return partial(_nats, graphdef, layout)
    return partial(_preferences, graphdef, layout, dpo)


def reference_of(config: LlamaConfig, params: Params) -> Params:
    """Returns a copy of a model's parameters, as DPO's reference.

    Each is in the dtype that it is computed with, so the copy computes the same.

    Args:
      config: the model, without adapters.
      params: its parameters.
    """
    return {name: x.astype(computed_dtype(config, name)) for name, x in params.items()}


def _nats(
    graphdef: nnx.GraphDef[Llama],
    layout: str,
    params: Params,
    part: Batch,
    reference: Params | None = None,
) -> Sums:
    del reference
    nats, labels, report = routed_loss(
        nnx.merge(graphdef, params),
        part["tokens"],
        part["labels"],
        segment_ids=part.get("segment_ids"),
        positions=part.get("positions"),
        layout=layout,
    )
    return Sums(nats, labels, {}, report)


def _preferences(
    graphdef: nnx.GraphDef[Llama],
    layout: str,
    dpo: DPO,
    params: Params,
    part: Batch,
    reference: Params | None = None,
) -> Sums:
    if "segment_ids" not in part:
        raise ValueError("the batch has no segment_ids: DPO needs those of its pairs")
    model, ids = nnx.merge(graphdef, params), part["segment_ids"]

    def answers(model: Llama) -> Array:
        """The log-prob of each document's answer."""
        predicted = logprobs(
            model,
            part["tokens"],
            ids,
            labels=part["labels"],
            positions=part.get("positions"),
            layout=layout,
        )
        return per_document(predicted.logprobs, ids, 2 * dpo.pairs)

    if reference is None and model.config.lora is None:
        raise ValueError(
            "reference=None is the model without its adapters, but it has none: give "
            "a copy, as first_state(..., with_reference=True) makes"
        )
    if reference is None:
        before = without_adapters(model)
    else:
        before = Llama.of_parameters(model.config, reference, mesh=model.mesh)
    pairs = _pairs(ids, dpo.pairs)
    found = dpo_loss(answers(model), answers(before), pairs, beta=dpo.beta)
    others = {name: getattr(found, name) * found.pairs for name in DPO_METRICS}
    return Sums(found.loss * found.pairs, found.pairs, others, None)


def _pairs(segment_ids: jax.Array, pairs: int) -> Int[Array, "B P 2"]:
    """The documents of each row's pairs, -1 after the last."""
    documents = jnp.arange(2 * pairs, dtype=jnp.int32).reshape(1, pairs, 2)
    is_there = documents[..., 1:] <= jnp.max(segment_ids, -1)[:, None, None]
    return jnp.where(is_there, documents, -1)
