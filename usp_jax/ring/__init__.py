"""Ring attention: each device's queries meet the keys and values of all shards.

`schedule.py` selects a schedule. `steps.py` is the algorithm over the turns of
`ring.py`, which `unidirectional.py`, `bidirectional.py` and `double.py` list.
`visits.py` leaves out hops that are known to be empty, `grouped.py` attends to several
shards at once. `all_gather.py` and `pass_q.py` are separate algorithms. `keys.py` makes
keys and values of what travels, `tokens.py` gathers the facts of all shards that masks
need, and `tables.py` holds what a kernel makes of masks before the ring.
"""

from usp_jax.ring.all_gather import AllGather as AllGather
from usp_jax.ring.bidirectional import Bidirectional as Bidirectional
from usp_jax.ring.double import Double as Double
from usp_jax.ring.keys import (
    Keys as Keys,
    Params as Params,
    SideBySide as SideBySide,
    Stays as Stays,
    apart as apart,
    side_by_side as side_by_side,
)
from usp_jax.ring.pass_q import PassQ as PassQ
from usp_jax.ring.ring import Ring as Ring
from usp_jax.ring.schedule import (
    SCHEDULES as SCHEDULES,
    Schedule as Schedule,
    schedule_backward as schedule_backward,
    schedule_forward as schedule_forward,
    schedule_of as schedule_of,
    schedule_tables as schedule_tables,
)
from usp_jax.ring.steps import together as together
from usp_jax.ring.tables import RingTables as RingTables
from usp_jax.ring.tokens import gather_tokens as gather_tokens
from usp_jax.ring.unidirectional import Unidirectional as Unidirectional
