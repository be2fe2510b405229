"""A feed-forward network of experts, as functions of one device's shards.

    tokens x [n, D]
      | routing.py    scores, the k experts of each token, and their weights
      | plan.py       pairs of token and expert, sorted by the device of the expert
      | exchange.py   rounds: all-to-all, the experts' products, all-to-all back
      | gated.py        the products of one round, forward and backward (grouped.py)
    y [n, D]          weighted sums; shared experts are added in layer.py

`losses.py` has the statistics and the auxiliary losses.
"""

from usp_jax.models.moe.exchange import (
    KEPT_NAMES as KEPT_NAMES,
    ROUTED_NAMES as ROUTED_NAMES,
)
from usp_jax.models.moe.gated import ExpertMatrices as ExpertMatrices
from usp_jax.models.moe.layer import (
    Metrics as Metrics,
    SharedExperts as SharedExperts,
    experts_feed_forward as experts_feed_forward,
)
from usp_jax.models.moe.losses import (
    AuxiliaryLosses as AuxiliaryLosses,
    Statistics as Statistics,
    auxiliary_losses as auxiliary_losses,
    statistics as statistics,
    updated_correction as updated_correction,
)
from usp_jax.models.moe.plan import (
    Exchange as Exchange,
    Traffic as Traffic,
    traffic as traffic,
)
from usp_jax.models.moe.routing import (
    IDS as IDS,
    Routing as Routing,
    route as route,
    router_logits as router_logits,
)
