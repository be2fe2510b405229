"""Chooses how to split a training step over a machine, before you rent it.

    row = usp_jax.plan.best("llama3-8b", "v5p", sequence=2**20, devices=64)
    row.choice, row.seconds.total, row.memory.peak, row.transfers

Traffic and memory model the program that `train` compiles; time is a model, from one
measured GPU, two calibrated numbers or cycles counted in TPU schedules
(`efficiency.py`). On the command line: `python -m usp_jax.plan`.
"""

from usp_jax.plan.choice import Choice as Choice, Job as Job
from usp_jax.plan.command import train_command as train_command
from usp_jax.plan.machines import (
    MACHINES as MACHINES,
    Link as Link,
    Machine as Machine,
    machine as machine,
)
from usp_jax.plan.row import Row as Row, evaluate as evaluate
from usp_jax.plan.search import (
    best as best,
    job_of as job_of,
    longest as longest,
    plan as plan,
)
from usp_jax.plan.tips import (
    TIPS as TIPS,
    against as against,
    wasteful as wasteful,
)
