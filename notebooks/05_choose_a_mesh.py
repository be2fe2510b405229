# %% [markdown]
# # 5. Choose a mesh before renting the machine
#
# `make_mesh(ring=…, ulysses=…)`: which numbers? It depends on the model, the length
# of the sequence, and the links of the machine. `usp_jax.plan` works it out on your
# laptop. This notebook asks it about a cluster, draws the answer, and then checks
# with the compiler that the bytes it counts are the bytes that programs send.

# %%
import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import usp_jax
from usp_jax import plan
from usp_jax.compiled import by_kind, collectives
from usp_jax.plan.attention import Call, backward_bytes, forward_bytes
from usp_jax.plan.command import describe

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
plt.style.use("petroff10")
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})
K, GIB = 1024, 2**30

# %% [markdown]
# ## The question
#
# Train LLaMA3-8B on 32 H100: four nodes of eight. Links are fast inside a node, and
# slow between nodes. Each step takes one sequence of 64K tokens.

# %%
job = plan.job_of("llama3-8b", "h100", sequence=64 * K, devices=32)
machine = job.machine
print(f"{machine.node} devices a node, {machine.memory_bytes / GIB:.0f} GiB each")
print(
    f"GB/s of a device: {machine.inner.bandwidth / 1e9:.0f} inside a node, "
    f"{machine.outer.bandwidth / 1e9:.0f} between nodes"
)

# %% [markdown]
# `plan.plan` tries every mesh, ZeRO level and policy of recomputing (`remat`), and
# ranks the choices that fit by the time of a step. The others come with a reason.

# %%
rows = plan.plan(job)
print("seconds  GiB a device  choice")
for row in rows[:5]:
    print(
        f"{row.seconds.total:7.3f}  {row.memory.peak / GIB:12.1f}  "
        f"{describe(row.choice)}"
    )

best = rows[0]
assert best.fits and best.memory.peak <= machine.memory_bytes
assert best.seconds.total == min(row.seconds.total for row in rows if row.can_train)

reasons = collections.Counter(row.reason.partition(":")[0] for row in rows)
print("\nof", len(rows), "choices:")
for reason, count in reasons.most_common():
    print(f"{count:5}  {reason or 'fit'}")

# %% [markdown]
# ## Ring against Ulysses
#
# Now we vary only the split of the sequence: `ring` × `ulysses` = 32. For lengths from
# 16K to 2M tokens we ask for the time of a step, and draw how much slower each split is
# than the best one at that length.

# %%
DEGREES = (1, 2, 4, 8, 16, 32)
LENGTHS = [n * K for n in (16, 32, 64, 128, 256, 512, 1024, 2048)]


def row_of(ulysses, length, remat="full"):
    """The plan's row of one split at one length."""
    asked = dataclasses.replace(job, sequence=length)
    choice = plan.Choice(ring=32 // ulysses, ulysses=ulysses, remat=remat)
    return plan.evaluate(asked, choice)


seconds = np.array(
    [[row_of(u, length).seconds.total for length in LENGTHS] for u in DEGREES]
)
slower = seconds / seconds.min(0)


# %%
def name_of(ulysses):
    return f"ring={32 // ulysses} × ulysses={ulysses}"


def draw_times():
    figure, axes = plt.subplots(figsize=(8, 4.2))
    for u, values, marker in zip(DEGREES, slower, "osD^vX", strict=True):
        axes.plot(LENGTHS, values, marker=marker, label=name_of(u))
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, "16K 32K 64K 128K 256K 512K 1M 2M".split())
    axes.set(xlabel="tokens of a sequence", ylabel="times the best split's step")
    axes.legend(fontsize=9)


draw_times()

# %% [markdown]
# At each of these lengths the best split fills a node with Ulysses and runs the ring
# over the slow links between nodes. A ring alone loses most with short sequences: a
# chunk of 2K tokens, measured on an H100, reaches a third of the rate of a chunk of
# 16K. With long sequences the split matters less, because work grows with the square
# of the length and traffic does not.

# %%
assert all(DEGREES[i] == machine.node for i in seconds.argmin(0))
alone = slower[0]
assert alone[0] > 2 and alone[-1] < 1.1
print(f"a ring alone: {alone[0]:.1f} times the best at 16K, {alone[-1]:.2f} at 2M")

# %% [markdown]
# ## Where the time goes
#
# Here are the parts of a step at 64K tokens. Communication that is hidden behind work
# is not counted, so `ring` is the time that devices wait for a hop, and `exchanges` is
# the time of the all-to-alls.


# %%
def draw_bars(axes, rows, names, attribute, unit):
    """Draws a stacked bar for each row, with the parts of its time or memory."""
    left = np.zeros(len(rows))
    parts = [field.name for field in dataclasses.fields(getattr(rows[0], attribute))]
    sizes = {
        part: np.array([getattr(getattr(row, attribute), part) for row in rows]) / unit
        for part in parts
    }
    for part, values in sizes.items():
        is_seen = values.max() > 0.01 * sum(sizes.values()).max()
        label = part if is_seen else None
        axes.barh(names, values, left=left, label=label, edgecolor="white")
        left += values
    axes.invert_yaxis()
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


splits = [row_of(u, 64 * K) for u in DEGREES]
figure, axes = plt.subplots(figsize=(9, 3))
draw_bars(axes, splits, [name_of(u) for u in DEGREES], "seconds", 1)
_ = axes.set_xlabel("seconds a step, 64K tokens")

# %%
attention = {u: row.seconds.attention for u, row in zip(DEGREES, splits, strict=True)}
exchanges = {u: row.seconds.exchanges for u, row in zip(DEGREES, splits, strict=True)}
assert attention[1] > 2 * attention[8]
assert exchanges[32] > exchanges[16] > 2 * exchanges[8]
# Every hop is hidden behind the chunk that is computed meanwhile.
assert all(row.seconds.ring == 0 for row in splits)

# %% [markdown]
# ## What fits
#
# Memory is the other half of the question. Here is the same mesh at 512K tokens, for
# each policy of what the backward pass recomputes. The black line is the memory of a
# device.

# %%
POLICIES = ("none", "dots", "attention_qkv", "attention", "full")
kept = [row_of(8, 512 * K, remat) for remat in POLICIES]
figure, axes = plt.subplots(figsize=(9, 2.6))
draw_bars(axes, kept, [f"remat={remat}" for remat in POLICIES], "memory", GIB)
axes.axvline(machine.memory_bytes / GIB, color="black")
_ = axes.set_xlabel("GiB a device, 512K tokens")

# %%
assert kept[0].memory.peak > kept[-1].memory.peak
for remat, row in zip(POLICIES, kept, strict=True):
    fits = "fits" if row.fits else "does not fit"
    print(f"{remat:<14} {row.seconds.total:6.2f} s a step, {fits}")

# %% [markdown]
# And the longest sequence for which any choice fits, by the number of devices:

# %%
counts = (8, 16, 32, 64)
longest = [
    plan.longest(dataclasses.replace(job, devices=devices)).sequence
    for devices in counts
]
for devices, length in zip(counts, longest, strict=True):
    print(f"{devices:3} devices: {length / 1e6:5.2f} million tokens")
assert all(b > 1.5 * a for a, b in zip(longest, longest[1:], strict=False))

# %% [markdown]
# ## Is it true?
#
# Seconds and memory are estimates: only one machine was timed. The number of bytes
# *sent*, though, is a formula, which a compiled program can confirm. We compile
# attention for our eight fake devices, forward and backward, for each split, with 8
# query heads and 2 heads for keys and values, and read every collective.

# %%
B, T, HEADS, KV_HEADS, HEAD_SIZE = 1, 1024, 8, 2, 16
SPLITS = ((8, 1), (4, 2), (2, 4), (1, 8))


def sent(program):
    """Bytes that a device sends: (in all-to-alls, around the ring)."""
    totals = {kind: x.wire_bytes for kind, x in by_kind(collectives(program)).items()}
    exchanged = totals.pop("all-to-all", 0)
    return np.array([exchanged, sum(totals.values())])


def compiled_bytes(ring, ulysses):
    """Bytes sent by the forward and the backward program, [2, 2]."""
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    attend = functools.partial(
        usp_jax.usp_attention, is_causal=True, layout="zigzag", mesh=mesh
    )
    sharding = jax.NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    arrays = [
        jax.device_put(jnp.ones((B, T, n, HEAD_SIZE)), sharding)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    ]
    forward = jax.jit(functools.partial(jax.vjp, attend)).lower(*arrays).compile()
    out, pull_back = forward(*arrays)
    backward = jax.jit(lambda pull, x: pull(x)).lower(pull_back, out).compile()
    return np.stack([sent(forward), sent(backward)])


def predicted_bytes(ring, ulysses):
    call = Call(B * T // 8, HEADS, KV_HEADS, HEAD_SIZE, ring, ulysses, itemsize=4)
    passes = forward_bytes(call), backward_bytes(call)
    return np.array([[one.ulysses, one.ring] for one in passes])


compiled = np.stack([compiled_bytes(*split) for split in SPLITS])
predicted = np.stack([predicted_bytes(*split) for split in SPLITS])
assert (compiled == predicted).all()
print("every count is equal, to the byte")


# %%
def draw_bytes():
    figure, axes = plt.subplots(figsize=(8, 3.8))
    place = np.arange(len(SPLITS))
    for side, name in enumerate(("forward", "backward")):
        x = place + (side - 0.5) * 0.4
        exchanged, rotated = predicted[:, side].T / K
        bottom = np.zeros(len(SPLITS))
        for values, color, what in (
            (exchanged, "C0", "all-to-all"),
            (rotated, "C1", "ring"),
        ):
            label = f"{what}, predicted" if side == 0 else None
            axes.bar(x, values, 0.36, bottom=bottom, color=color, label=label)
            bottom = bottom + values
        label = "compiled, in all" if side == 0 else None
        axes.plot(x, compiled[:, side].sum(1) / K, "kD", markersize=6, label=label)
        for at, height in zip(x, bottom, strict=True):
            place_of = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            axes.annotate(name, (at, height), fontsize=8, **place_of)
    axes.set_xticks(place, [f"ring={r}, ulysses={u}" for r, u in SPLITS])
    axes.set_ylabel("KiB sent by a device")
    axes.margins(y=0.12)
    axes.legend(fontsize=9)


draw_bytes()

# %% [markdown]
# The backward pass of a ring sends the gradients of keys and values in float32, in
# addition to the keys and values themselves; that is why it sends more.
#
# On Linux, `pip install 'usp_jax[aot]'` installs the compilers of real machines, and
# `python -m usp_jax.plan … --verify` compares their figures with the plan's in the same
# way: bytes sent and memory of the whole training step.
#
# ## The command
#
# The plan ends with the command to type. It also reports which of the seven tips of the
# [USP paper](https://arxiv.org/abs/2405.07719) a choice goes against, if any.

# %%
command = plan.train_command(job, best.choice)
print(command.replace(" --", " \\\n    --"))
for number in plan.against(best):
    print(f"\nagainst tip {number}: {plan.TIPS[number]}")

# %% [markdown]
# The same from a shell:
#
# ```text
# python -m usp_jax.plan --model llama3-8b --machine h100 --devices 32 --sequence 64K
# ```
#
# [Notebook 6](06_train_kill_resume.ipynb) starts a training run, and stops it.
