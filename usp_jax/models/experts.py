"""The description of a feed-forward network of experts: what config.json holds."""

import dataclasses
import math

from usp_jax.checks import check_bool, check_count, check_positive_int

SCORES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Experts:
    """A feed-forward network of which each token uses a few parts, its experts.

    A router gives each token a score for each expert. The token's output is the sum of
    the outputs of the experts with the best scores, weighted with these scores, and of
    the shared experts.

    Attributes:
      num_experts: number of routed experts.
      experts_per_token: number of experts that a token uses.
      d_expert: hidden size of each routed expert.
      scores: function from the router's logits to scores: "softmax", or "sigmoid" as
        in DeepSeek-V3.
      renormalize: whether the scores of a token's experts are divided by their sum, as
        in Mixtral, Qwen3-MoE and DeepSeek-V3. With "softmax" that is the softmax of the
        chosen logits alone (gpt-oss).
      scaling: factor of the weights.
      groups: number of equal groups of experts (DeepSeek-V3).
      groups_per_token: number of groups whose experts a token can use: those whose two
        best scores have the largest sum.
      correction_bias: whether a bias is added to the scores when experts are chosen,
        but not to the weights (arXiv 2408.15664).
      router_bias: whether the router's logits have a bias (gpt-oss).
      biases: whether the matrices of the routed experts have biases (gpt-oss).
      clamp: if given, experts compute (up + 1) · gate · sigmoid(1.702 gate), with gate
        clamped from above and up from both sides (gpt-oss).
      shared_d_ff: hidden size of all shared experts together; 0 is none.
      shared_gate: whether each token scales the output of the shared experts with a
        sigmoid (Qwen2-MoE, Qwen3-Next).
    """

    num_experts: int
    experts_per_token: int
    d_expert: int
    scores: str = "softmax"
    renormalize: bool = True
    scaling: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    correction_bias: bool = False
    router_bias: bool = False
    biases: bool = False
    clamp: float | None = None
    shared_d_ff: int = 0
    shared_gate: bool = False


def check_experts(experts: Experts) -> None:
    """Checks each field of a description.

    Raises:
      ValueError: a value is invalid; the message names the field and its value.
    """
    for name in (
        "num_experts",
        "experts_per_token",
        "d_expert",
        "groups",
        "groups_per_token",
    ):
        check_positive_int(name, getattr(experts, name))
    check_count("shared_d_ff", experts.shared_d_ff, least=0)
    for name in (
        "renormalize",
        "correction_bias",
        "router_bias",
        "biases",
        "shared_gate",
    ):
        check_bool(name, getattr(experts, name))
    if experts.scores not in SCORES:
        raise ValueError(f"scores={experts.scores!r} must be one of {SCORES}")
    if not 0 < experts.scaling < math.inf:
        raise ValueError(f"scaling={experts.scaling!r} must be positive and finite")
    if experts.clamp is not None and not 0 < experts.clamp < math.inf:
        raise ValueError(f"clamp={experts.clamp!r} must be positive and finite")
    if experts.shared_gate and not experts.shared_d_ff:
        raise ValueError("shared_gate=True needs shared experts: give shared_d_ff")
    _check_choice(experts)


def _check_choice(experts: Experts) -> None:
    """Checks that a token can choose its number of experts from its groups."""
    number, groups = experts.num_experts, experts.groups
    if number % groups or (groups > 1 and number // groups < 2):
        raise ValueError(
            f"groups={groups} must divide num_experts={number} into groups of at least "
            "2 experts"
        )
    if experts.groups_per_token > groups:
        raise ValueError(
            f"groups_per_token={experts.groups_per_token} must be at most "
            f"groups={groups}"
        )
    available = number // groups * experts.groups_per_token
    if experts.experts_per_token > available:
        raise ValueError(
            f"experts_per_token={experts.experts_per_token} must be at most "
            f"{available}, the experts in groups_per_token="
            f"{experts.groups_per_token} of groups={groups} of num_experts={number}"
        )
