# %% [markdown]
# # 2. Ulysses, Ring, and both on one mesh
#
# Attention is a table: each query (a row) meets each key (a column), and there is one
# such table for each head. There are two ways to share this work when each device
# starts with one shard of the sequence:
#
# * **Ulysses** trades tokens for heads: afterwards a device has *all tokens of some
#   heads*, and needs no other device.
# * **Ring** leaves *all heads of some tokens* where they are, and sends keys and
#   values around the ring.
#
# USP puts the devices on a grid and does both. This notebook follows every token and
# head with the library's own functions, and draws which device has it.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

import usp_jax
from usp_jax.compiled import by_kind, collectives
from usp_jax.ulysses import Heads, to_heads, to_seq

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
plt.style.use("petroff10")
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Tokens that know their names
#
# We take 8 tokens and 8 heads for 8 devices. Instead of numbers to compute with, each
# element of the array is a name: (token, head). Then we do what USP does on each
# device, and look at which names it has. A mesh is a grid of `ring` × `ulysses`
# devices: device `d` is in row `d // ulysses` and column `d % ulysses`.

# %%
TOKENS = HEADS = DEVICES = 8
names = np.stack(np.indices((TOKENS, HEADS)), -1)[None]  # [1, T, N, (token, head)]


def journey(mesh):
    """The names that each device holds: as stored, as queries, as keys step by step."""
    ring = mesh.shape["ring"]
    sequence = ("ring", "ulysses")

    @jax.shard_map(mesh=mesh, in_specs=jax.P(None, sequence), out_specs=jax.P(sequence))
    def follow(stored):
        queries = to_heads(stored, "ulysses")  # the all-to-all
        keys = [queries]  # keys and values take the same one
        for _ in range(ring - 1):
            to_next = [(i, (i + 1) % ring) for i in range(ring)]
            keys.append(lax.ppermute(keys[-1], "ring", to_next))
        back = to_seq(queries, "ulysses")  # what becomes of the output
        return stored, queries, jnp.stack(keys, 1), back

    stored, queries, keys, back = (np.asarray(x) for x in jax.jit(follow)(names))
    assert (back == stored).all()
    return stored, queries, np.moveaxis(keys, 1, 0)


meshes = {
    "Ulysses": usp_jax.make_mesh(ulysses=8),
    "Ring": usp_jax.make_mesh(ring=8),
    "both": usp_jax.make_mesh(ring=4, ulysses=2),
}
journeys = {name: journey(mesh) for name, mesh in meshes.items()}


# %%
def owners(held):
    """The device that holds each (token, head), int [T, N]."""
    grid = np.full((TOKENS, HEADS), -1)
    for device, its in enumerate(held):
        for token, head in its.reshape(-1, 2):
            assert grid[token, head] == -1, "held twice"
            grid[token, head] = device
    assert (grid >= 0).all(), "lost"
    return grid


COLORS = np.array([to_rgb(f"C{device}") for device in range(DEVICES)])
# Black numbers on light colours, white ones on dark colours.
INK = np.where(COLORS @ (0.3, 0.6, 0.1) > 0.55, "black", "white")


def label_devices(axes, grid):
    """Writes each device's number in the middle of what it holds."""
    for device in range(DEVICES):
        y, x = np.argwhere(grid == device).mean(0)
        style = {"color": INK[device], "weight": "bold", "ha": "center", "va": "center"}
        axes.text(x, y, device, **style)


def draw_owners(panels, width):
    """Draws one grid of tokens by heads for each panel."""
    figure, row = plt.subplots(1, len(panels), figsize=(width, 2.9), sharey=True)
    for axes, (title, held) in zip(row, panels.items(), strict=True):
        grid = owners(held)
        axes.imshow(COLORS[grid])
        label_devices(axes, grid)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="head", xticks=range(0, HEADS, 2), yticks=range(0, TOKENS, 2))
    row[0].set_ylabel("token")


# %% [markdown]
# ## Ulysses: `make_mesh(ulysses=8)`
#
# Each colour and number is a device. At first a device has one token of all heads (a
# row). One *all-to-all* later it has all tokens of one head (a column). A head's
# attention needs only its own queries, keys and values, so each device computes its
# head on its own. A second all-to-all brings the output back to rows.

# %%
stored, queries, keys = journeys["Ulysses"]
draw_owners(
    {"as stored": stored, "q, k, v after the all-to-all": queries, "output": stored}, 8
)
assert (owners(queries) == np.arange(HEADS)[None, :]).all()

# %% [markdown]
# The catch is in the picture: with 8 heads there are 8 columns, and a ninth device
# would have nothing to do.
#
# ## Ring: `make_mesh(ring=8)`
#
# Queries never move. Keys and values move to the next device at each step: look at
# where token 0 is (the top row). After eight steps each device has seen all keys. The
# partial results are merged as [notebook 1](01_online_softmax.ipynb) shows.

# %%
stored, queries, keys = journeys["Ring"]
draw_owners(
    {"q, all the time": queries}
    | {f"k, v at step {s}": keys[s] for s in (0, 1, 2)}
    | {"k, v at step 7": keys[7]},
    11,
)
assert (owners(queries) == np.arange(TOKENS)[:, None]).all()
assert len(keys) == 8  # eight steps, so seven hops

# %% [markdown]
# There may be as many devices as there are tokens. The price is seven hops instead of
# one exchange.
#
# ## Both: `make_mesh(ring=4, ulysses=2)`
#
# Now pairs of devices (0 and 1, 2 and 3, …) do a small all-to-all: each then has two
# tokens of four heads. Along the other direction of the grid there are two rings of
# four devices: 0 → 2 → 4 → 6 for the heads on the left, and 1 → 3 → 5 → 7 for those on
# the right. Three hops are enough.

# %%
stored, queries, keys = journeys["both"]
draw_owners(
    {"as stored": stored, "q after the all-to-all": queries}
    | {f"k, v at step {s}": keys[s] for s in range(4)},
    12,
)

# %% [markdown]
# ## Every query meets every key exactly once
#
# At each step a device computes the part of each head's table that belongs to its
# queries and the keys it holds. We mark these parts with the device and the step, and
# check that nothing is left out or computed twice.


# %%
def work(queries, keys):
    """The device and the step that compute each pair, int [N, T, S] each."""
    device_of = np.full((HEADS, TOKENS, TOKENS), -1)
    step_of = device_of.copy()
    for step, held in enumerate(keys):
        for device in range(DEVICES):
            for token, head in queries[device].reshape(-1, 2):
                own = held[device].reshape(-1, 2)
                met = own[own[:, 1] == head, 0]
                assert (device_of[head, token, met] == -1).all(), "computed twice"
                device_of[head, token, met] = device
                step_of[head, token, met] = step
    assert (device_of >= 0).all(), "left out"
    return device_of, step_of


# %%
def draw_work(heads):
    figure, grid = plt.subplots(len(heads), 3, figsize=(10.5, 6.4), sharex=True)
    for column, name in enumerate(("Ulysses", "both", "Ring")):
        device_of, step_of = work(*journeys[name][1:])
        for axes, head in zip(grid[:, column], heads, strict=True):
            axes.imshow(COLORS[device_of[head]])
            for (t, s), step in np.ndenumerate(step_of[head]):
                style = {"color": INK[device_of[head, t, s]], "size": 8}
                axes.text(s, t, step, ha="center", va="center", **style)
            axes.set_title(f"{name}, head {head}", fontsize=10)
            axes.set(xticks=range(0, 8, 2), yticks=range(0, 8, 2))
        grid[-1, column].set_xlabel("key")
    for axes in grid[:, 0]:
        axes.set_ylabel("query")
    patches = [Patch(color=COLORS[d], label=f"device {d}") for d in range(DEVICES)]
    figure.legend(handles=patches, loc="outside right center", fontsize=9)


draw_work((0, 7))

# %% [markdown]
# The colour is the device, the number is the step. Ulysses gives a whole table to one
# device, in one step. In the ring all heads look the same: a device has a row, and
# moves along it, starting at its own key. With both, a device has half of the heads
# and a quarter of the rows, and takes four steps.
#
# ## The real thing
#
# `usp_attention` is one function for all of these; only the mesh differs. It returns
# the same as attention on one device, and its compiled program has only the collectives
# in the pictures: *all-to-alls* for Ulysses (one for q, one for k and v together, one
# for the output) and one *permute* for each hop of the ring.

# %%
B, T, N, H = 1, 256, 8, 16
arrays = jax.random.normal(jax.random.key(0), (3, B, T, N, H))
expected = jax.nn.dot_product_attention(*arrays)
exchanges = []

print("            all-to-alls  permutes  KiB sent by a device  largest error")
for name, mesh in meshes.items():
    attend = jax.jit(functools.partial(usp_jax.usp_attention, mesh=mesh))
    sharding = jax.NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    placed = [jax.device_put(x, sharding) for x in arrays]
    program = attend.lower(*placed).compile()
    error = float(abs(program(*placed) - expected).max())
    totals = by_kind(collectives(program))
    counts = [
        totals[kind].executions if kind in totals else 0
        for kind in ("all-to-all", "collective-permute")
    ]
    sent = sum(total.wire_bytes for total in totals.values()) / 1024
    exchanges.append(counts)
    print(f"{name:<10}  {counts[0]:11}  {counts[1]:8}  {sent:20.0f}  {error:13.0e}")
    assert error < 1e-5

assert exchanges == [[3, 0], [0, 7], [3, 3]]

# %% [markdown]
# Ulysses sends least, but cannot use more devices than there are heads. The ring has no
# such limit, and sends more. The grid is a compromise, and its two directions suit
# machines with two kinds of links: the all-to-all inside a node, the ring between
# nodes.
#
# ## Fewer key and value heads
#
# Most models today have fewer heads for keys and values than for queries (GQA). Only
# these few heads are sent. If there are fewer of them than devices in the all-to-all,
# each device receives only those that its queries need:

# %%
heads = Heads(num_heads=8, num_kv_heads=2, ulysses_size=4)
for device in range(4):
    print(
        f"ulysses device {device}: query heads {2 * device} and {2 * device + 1}, "
        f"key and value heads {heads.sent[device].tolist()}"
    )
assert heads.sent.tolist() == [[0], [0], [1], [1]]

attend = functools.partial(
    usp_jax.usp_attention, mesh=usp_jax.make_mesh(ring=2, ulysses=4)
)
q, k, v = arrays[0], arrays[1, :, :, :2], arrays[2, :, :, :2]
assert np.allclose(attend(q, k, v), jax.nn.dot_product_attention(q, k, v), atol=1e-5)

# %% [markdown]
# So far every query has seen every key. With a causal mask half of the table is empty,
# and some devices would wait for others. [Notebook 3](03_layouts_and_balance.ipynb) is
# about that.
