# %% [markdown]
# # 3. Layouts, masks and balance: no device should wait
#
# With a mask, many pairs of a query and a key need not be computed. This saves time
# only if **every device** gets its share of the savings: a step of the ring ends when
# its slowest device is done. How long a device works depends on which tokens it has.
# This notebook counts the work, draws it, and balances it.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import usp_jax
from usp_jax.compiled import by_kind, collectives
from usp_jax.masking import Mask, MaskRule, Tokens, visible
from usp_jax.ringwork import by_step

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
plt.style.use("petroff10")
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

RING = 8
mesh = usp_jax.make_mesh(ring=RING)

# %% [markdown]
# ## Three orders of the same tokens
#
# A *layout* is the order in which the tokens are stored. The stored row is then cut
# into equal shards, one for each device of the ring.
#
# * `contiguous`: device 0 has the first tokens, device 7 the last.
# * `zigzag`: the row is cut into 16 chunks; device $r$ has chunk $r$ from the front
#   and chunk $r$ from the back.
# * `striped`: device $r$ has every eighth token.
#
# `layout_positions` returns the position of each stored token. Here are 64 tokens,
# coloured by the device that has them.

# %%
LAYOUTS = ("contiguous", "zigzag", "striped")


def draw_layouts(length):
    figure, rows = plt.subplots(3, 1, figsize=(9, 2.6), sharex=True)
    for axes, layout in zip(rows, LAYOUTS, strict=True):
        device_at = np.empty(length, int)
        positions = np.asarray(usp_jax.layout_positions(length, layout, mesh))
        device_at[positions] = np.repeat(np.arange(RING), length // RING)
        for position, device in enumerate(device_at):
            axes.barh(0, 1, left=position, color=f"C{device}", alpha=0.7)
            axes.text(position + 0.5, 0, device, ha="center", va="center", size=8)
        axes.set(xlim=(0, length), yticks=[])
        axes.set_ylabel(layout, rotation=0, ha="right", va="center")
    rows[-1].set_xlabel("position in the text")


draw_layouts(64)

# %% [markdown]
# ## What a device sees
#
# With a causal mask a query sees the keys up to its own position. Below is the table
# of queries and keys *in stored order*; black lines separate the devices. A device
# computes one band of rows; in the ring it visits one band of columns at each step.


# %%
def seen(positions, segment_ids=None):
    """The causal mask of stored queries (rows) and stored keys, bool [T, T]."""
    tokens = Tokens(jnp.asarray(positions), segment_ids)
    return np.asarray(visible(Mask(MaskRule(is_causal=True), tokens, tokens)))


def draw_masks(masks):
    figure, row = plt.subplots(1, len(masks), figsize=(3.2 * len(masks), 3.5))
    for axes, (title, mask) in zip(row, masks.items(), strict=True):
        axes.imshow(mask, cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
        edges = np.arange(1, RING) * len(mask) / RING - 0.5
        axes.hlines(edges, -0.5, len(mask) - 0.5, color="black", linewidth=0.6)
        axes.vlines(edges, -0.5, len(mask) - 0.5, color="black", linewidth=0.6)
        axes.set(title=title, xticks=[], yticks=[], xlabel="stored keys")
    row[0].set_ylabel("stored queries")


draw_masks(
    {layout: seen(usp_jax.layout_positions(128, layout, mesh)) for layout in LAYOUTS}
)

# %% [markdown]
# Contiguous: the upper blocks are empty, the lower ones full. Zigzag: every block off
# the diagonal is half full. Striped: every block is nearly a triangle.
#
# ## Work by device and step
#
# `usp_jax.ring_balance` counts the visible pairs of every two shards. At step $i$
# device $r$ has the keys of device $r - i$. In each map a row is a device, a column
# is a step, and the number is its work, where 1 (grey) is an even share. Red devices
# work while blue ones wait. Two numbers summarize a map:
#
# * **totals**: the work of the busiest device, divided by the mean. This would be the
#   relative time of the ring if no device waited at each step.
# * **path**: at each step all devices wait for the slowest, so this is the sum of the
#   largest number of each column, divided by the mean. It is the relative time of the
#   ring. **1 is perfect.**


# %%
def draw_work(works):
    figure, row = plt.subplots(
        1, len(works), figsize=(3.7 * len(works) + 0.6, 3.9), sharey=True
    )
    for axes, (title, work) in zip(row, works.items(), strict=True):
        even = work.pairs.sum() / RING**2
        share = by_step(work.pairs).T / even  # [device, step]
        image = axes.imshow(share, cmap="coolwarm", vmin=0, vmax=2)
        for (device, step), value in np.ndenumerate(share):
            color = "black" if 0.4 < value < 1.6 else "white"
            text = f"{value:.1f}" if value else "·"
            axes.text(step, device, text, ha="center", va="center", color=color, size=8)
        axes.set_title(
            f"{title}\ntotals {work.totals:.2f}, path {work.path:.2f}", fontsize=11
        )
        axes.set(xlabel="step", xticks=range(RING), yticks=range(RING))
    row[0].set_ylabel("device")
    figure.colorbar(image, ax=row, label="work", ticks=(0, 1, 2), extend="max")


LENGTH = 8192
causal = {
    layout: usp_jax.ring_balance(
        np.asarray(usp_jax.layout_positions(LENGTH, layout, mesh)), None, RING
    )
    for layout in LAYOUTS
}
draw_work(causal)

# %% [markdown]
# In the contiguous layout device 0 has work only in its first step, and device 7 in
# all steps. At every step *some device* has a full block, so the ring takes as long as
# without a mask: half of the time is spent waiting. Zigzag and striped reach the ideal.
# The total work is the same: which pairs are visible does not depend on the order.

# %%
ideal = LENGTH * (LENGTH + 1) // 2
assert all(work.pairs.sum() == ideal for work in causal.values())
assert np.isclose(causal["contiguous"].path, (2 * RING - 1) / RING, rtol=1e-3)
for layout in ("zigzag", "striped"):
    assert causal[layout].path < 1.01

# %% [markdown]
# ## Packed documents
#
# Real batches pack several documents into one row, and a token sees only its own
# document. Then zigzag is no longer even: a device whose two chunks are in a long
# document works much longer than one with short documents. `usp_jax.balance` takes the
# lengths of the documents, cuts the row into chunks, and gives each device the same
# number of chunks and nearly the same number of visible pairs. Its result is data: an
# order, positions, and segment ids.

# %%
documents = [2900, 180, 90, 1500, 60, 240, 700, 1100, 130, 410, 882]
plan = usp_jax.balance(documents, RING)
assert len(plan.order) == sum(documents) == LENGTH

ids = np.repeat(np.arange(len(documents)), documents)
packed = {}
for layout in ("contiguous", "zigzag"):
    positions = np.asarray(usp_jax.layout_positions(LENGTH, layout, mesh))
    packed[layout] = usp_jax.ring_balance(positions, ids[positions], RING)
packed["balanced"] = usp_jax.ring_balance(plan.positions, plan.segment_ids, RING)
draw_work(packed)

# %% [markdown]
# Numbers above 2 are drawn in the same red. Again the total work is the same, and the
# path determines the time.

# %%
assert len({work.pairs.sum() for work in packed.values()}) == 1
assert packed["balanced"].path < 1.2 < 1.5 < packed["zigzag"].path
for name, work in packed.items():
    print(f"{name:<10} takes {work.path:.2f} times as long as even work would")


# %%
def draw_owners():
    figure, rows = plt.subplots(3, 1, figsize=(9, 2.9), sharex=True)
    edges = np.cumsum([0, *documents])
    for number, (start, stop) in enumerate(zip(edges, edges[1:], strict=False)):
        gray = ("0.75", "0.9")[number % 2]
        rows[0].barh(0, stop - start, left=start, color=gray)
    orders = {
        "zigzag": np.asarray(usp_jax.layout_positions(LENGTH, "zigzag", mesh)),
        # Chunks large enough to be seen.
        "balanced": usp_jax.balance(documents, RING, chunk=128).order,
    }
    for axes, (name, order) in zip(rows[1:], orders.items(), strict=True):
        device_at = np.empty(LENGTH, int)
        device_at[order] = np.repeat(np.arange(RING), LENGTH // RING)
        cuts = np.flatnonzero(np.diff(device_at, prepend=-1, append=-1))
        for start, stop in zip(cuts, cuts[1:], strict=False):
            axes.barh(0, stop - start, left=start, color=f"C{device_at[start]}")
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    rows[0].set_ylabel("documents", rotation=0, ha="right", va="center")
    for axes in rows:
        axes.set(yticks=[], xlim=(0, LENGTH))
    rows[-1].set_xlabel("position in the row")


draw_owners()

# %% [markdown]
# Each device (a colour) has a part of each long document: a zigzag of many turns.
# Here it is drawn with chunks of 128 tokens, so that they can be seen; smaller chunks
# balance better.
#
# ## The result is the same
#
# For an order chosen by the data loader, use `layout="data"`, and pass positions and
# segment ids with the call. We compare all three layouts with plain attention on one
# device, in natural order and with the whole 1024 × 1024 mask.

# %%
small = [n // 8 for n in (2900, 180, 90, 1500, 60, 240, 700, 1100, 130, 410)]
T = 1024
plan = usp_jax.balance(small, RING, length=T)  # what is left over is padding
ids = np.full(T, -1, np.int32)
ids[: sum(small)] = np.repeat(np.arange(len(small)), small)

q, k, v = np.asarray(jax.random.normal(jax.random.key(0), (3, 1, T, 2, 16)))
mask = seen(np.arange(T), jnp.asarray(ids))
expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask)[None, None])
real = ids >= 0


def check(layout, to_stored, to_natural, **tokens):
    attend = functools.partial(
        usp_jax.usp_attention, mesh=mesh, is_causal=True, layout=layout
    )
    out = attend(*(jnp.asarray(to_stored(x)) for x in (q, k, v)), **tokens)
    out = to_natural(np.asarray(out))
    assert np.allclose(out[:, real], np.asarray(expected)[:, real], atol=1e-5)
    assert (out[:, ~real] == 0).all()  # padding gives exactly 0
    print(f"{layout}: equal")


for layout in ("contiguous", "zigzag"):
    check(
        layout,
        functools.partial(usp_jax.to_layout, layout=layout, mesh=mesh),
        functools.partial(usp_jax.from_layout, layout=layout, mesh=mesh),
        segment_ids=usp_jax.to_layout(ids[None], layout, mesh),
    )
check(
    "data",
    functools.partial(plan.to_stored, axis=1),
    functools.partial(plan.to_natural, axis=1),
    segment_ids=plan.segment_ids[None],
    positions=plan.positions[None],
)

# %% [markdown]
# ## Windows: when contiguous wins
#
# With a sliding window a query sees only the last tokens. In the contiguous layout
# these are on its own device and the previous one. In all other steps nothing is
# visible, and `usp_attention` leaves these hops out of the compiled program.

# %%
WINDOW = (127, 0)  # a query sees 127 tokens before it, and itself
shape = jax.ShapeDtypeStruct(
    (1, 2048, 2, 16), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(None, "ring"))
)
hops = {}
for layout in LAYOUTS:
    attend = functools.partial(
        usp_jax.usp_attention,
        mesh=mesh,
        is_causal=True,
        local_window_size=WINDOW,
        layout=layout,
    )
    program = jax.jit(attend).lower(shape, shape, shape).compile()
    permutes = by_kind(collectives(program))["collective-permute"]
    hops[layout] = permutes.executions
    print(
        f"{layout:<10} {permutes.executions} hops, "
        f"{permutes.wire_bytes / 1024:.0f} KiB sent by a device"
    )

assert hops["contiguous"] == 1 and hops["striped"] == RING - 1
assert hops["zigzag"] < RING - 1

# %% [markdown]
# ## Which one to choose
#
# | your rows | layout |
# |---|---|
# | one long text, causal | `zigzag` |
# | packed documents of very different lengths | `balance`, as `layout="data"` |
# | sliding windows | `contiguous` |
# | no mask | any; `contiguous` needs no permutation |
#
# [Notebook 4](04_long_flax_model.ipynb) puts this into a model.
