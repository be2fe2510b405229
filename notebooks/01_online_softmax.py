# %% [markdown]
# # 1. The online softmax: why chunks can be merged
#
# A long sequence does not fit on one device. So each device holds a *chunk* of the
# keys and values, and each query has to visit all chunks, one after the other.
#
# At first sight that cannot work: the softmax divides by a sum over **all** keys, and
# a device that sees one chunk does not know that sum. This notebook shows the
# identity that makes it work, and on which everything else in `usp_jax` rests.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import lax

import usp_jax
from usp_jax.merge import merge

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
plt.style.use("petroff10")
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Attention of one query
#
# A query $q$ compares itself with the keys $k_1 \dots k_S$. The comparisons are the
# *logits* $x_j = q \cdot k_j / \sqrt{H}$, where $H$ is the size of a head. The
# softmax turns them into weights, and the output is the weighted mean of the values:
#
# $$ p_j = \frac{e^{x_j}}{\sum_i e^{x_i}}, \qquad \text{out} = \sum_j p_j \, v_j . $$
#
# Let us take one query and 32 keys, and split the keys into four chunks of eight.

# %%
CHUNKS, SIZE, HEAD = 4, 8, 16
keys = jax.random.split(jax.random.key(2), 3)
query = 1.5 * jax.random.normal(keys[0], (HEAD,))
key, value = (jax.random.normal(k, (CHUNKS, SIZE, HEAD)) for k in keys[1:])

logits = key @ query / np.sqrt(HEAD)  # [CHUNKS, SIZE]
alone = jax.nn.softmax(logits, axis=1)  # each chunk by itself
whole = jax.nn.softmax(logits.reshape(-1)).reshape(CHUNKS, SIZE)

assert np.allclose(alone.sum(1), 1) and np.isclose(whole.sum(), 1)


# %%
def draw_chunks(panels):
    figure, rows = plt.subplots(len(panels), 1, figsize=(9, 6.2), sharex=True)
    for axes, (title, heights) in zip(rows, panels.items(), strict=True):
        for c in range(CHUNKS):
            place = c * SIZE + np.arange(SIZE)
            axes.bar(place, heights[c], color=f"C{c}", label=f"chunk {c}")
        axes.set_title(title, loc="left", fontsize=11)
        axes.axhline(0, color="black", linewidth=0.8)
    rows[0].legend(ncols=CHUNKS, fontsize=9, loc="upper right")
    rows[0].set_ylim(top=1.5 * float(logits.max()))
    rows[-1].set_xlabel("key")


draw_chunks(
    {
        "logits": logits,
        "softmax within each chunk: four sums of 1": alone,
        "softmax over all keys: one sum of 1": whole,
    }
)

# %% [markdown]
# Look at the last two rows. Within a chunk the bars have **the same shape**. Only
# their height differs, by one factor per chunk. This single number is all that a chunk
# lacks on its own.
#
# ## What a chunk has to remember
#
# Let $L_c = \log \sum_{j \in c} e^{x_j}$ be the *log-sum-exp* of the logits of chunk
# $c$ (`lse` in the code). The sum over all keys is then $\sum_c e^{L_c}$, and
#
# $$ p_j = \underbrace{\frac{e^{x_j}}{e^{L_c}}}_{\text{softmax within chunk } c}
#    \cdot \underbrace{\frac{e^{L_c}}{\sum_d e^{L_d}}}_{w_c} . $$
#
# The factor $w_c$ is a softmax again, this time over the chunks. So the pair (out,
# lse) is all that has to be kept of a chunk, whatever its number of keys.

# %%
lse = jax.nn.logsumexp(logits, axis=1)  # [CHUNKS]
factor = jax.nn.softmax(lse)
assert np.allclose(alone * factor[:, None], whole, atol=1e-6)

print("chunk    lse  factor")
for c in range(CHUNKS):
    print(f"{c:5}  {lse[c]:5.2f}  {factor[c]:6.3f}")

# %% [markdown]
# ## The merge
#
# Two partial results $(a, L_a)$ and $(b, L_b)$ over disjoint sets of keys give the
# result over both sets:
#
# $$ L = \log(e^{L_a} + e^{L_b}), \qquad
#    \text{out} = e^{L_a - L}\, a + e^{L_b - L}\, b . $$
#
# In `usp_jax` this is one function, `usp_jax.merge.merge`. The library's attention on
# one device, `flash_attention`, returns both parts of the pair with
# `return_residual=True`. Here it computes 4 heads with 64 queries each.

# %%
B, T, N, H = 1, 64, 4, 16
q, k, v = jax.random.normal(jax.random.key(1), (3, B, T, N, H))


def attend(keys):
    """Attention of all queries to some of the keys: (out, lse)."""
    return usp_jax.flash_attention(q, k[:, keys], v[:, keys], return_residual=True)


parts = [attend(slice(start, start + 16)) for start in range(0, T, 16)]
expected = jax.nn.dot_product_attention(q, k, v)


def merge_all(order):
    """Merges the four parts in the given order."""
    out, lse = parts[order[0]]
    for c in order[1:]:
        out, lse = merge(out, lse, *parts[c])
    return out, lse


for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
    out, _ = merge_all(order)
    error = float(abs(out - expected).max())
    assert error < 1e-6
    print(f"merged in the order {order}: largest error {error:.0e}")

# %% [markdown]
# Any order works, and so does any grouping: merging 0 with 1, 2 with 3, and then the
# two results, gives the same. A chunk in which a query sees nothing (a mask may hide
# all of it) has out = 0 and lse = -∞, and changes nothing. In algebraic terms: the
# merge is associative, commutative, and has a neutral element.

# %%
left, right = merge(*parts[0], *parts[1]), merge(*parts[2], *parts[3])
assert np.allclose(merge(*left, *right)[0], expected, atol=1e-6)

nothing = jnp.zeros_like(q), jnp.full((B, T, N), -jnp.inf)
for a, b in ((parts[0], nothing), (nothing, parts[0])):
    assert all(np.allclose(x, y) for x, y in zip(merge(*a, *b), parts[0], strict=True))

# %% [markdown]
# ## Step by step
#
# A device does not keep all the parts: it *carries* one pair and merges each chunk
# into it as it arrives. Below, queries visit 16 chunks of four keys. The lse never
# decreases, and the output moves to its final value. Before the last chunk, the output
# is exact attention to the keys seen so far.

# %%
steps = []
out, lse = nothing
for start in range(0, T, 4):
    out, lse = merge(out, lse, *attend(slice(start, start + 4)))
    steps.append((out, lse))

assert np.allclose(steps[-1][0], expected, atol=1e-6)
assert all((b[1] >= a[1]).all() for a, b in zip(steps, steps[1:], strict=False))


# %%
def draw_carry(tokens):
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
    seen = 4 * np.arange(1, len(steps) + 1)
    for t in tokens:
        top.plot(seen, [lse[0, t, 0] for _, lse in steps], "o-", label=f"query {t}")
        away = [abs(out[0, t, 0] - expected[0, t, 0]).max() for out, _ in steps]
        bottom.plot(seen[:-1], away[:-1], "o-")
    top.set(ylabel="lse carried")
    top.legend(fontsize=9)
    bottom.set(xlabel="keys seen", ylabel="distance from\nthe final output")


draw_carry((5, 20, 40))

# %% [markdown]
# ## Two traps
#
# **Overflow.** $e^{x}$ overflows float32 from $x = 89$ on. So the lse is stored instead
# of the sum of exponentials, and before taking exponentials the larger of the two is
# subtracted. What is left is at most $e^0 = 1$.

# %%
large = 100 * logits
naive = jnp.exp(large).sum()
stable = jax.nn.logsumexp(large)
print(f"sum of exponentials: {naive}, log-sum-exp: {stable:.1f}")
assert np.isinf(naive) and np.isfinite(stable)

# %% [markdown]
# **Rounding.** Models compute in bfloat16, which keeps 8 bits. If the carried pair
# were rounded to bfloat16 after each chunk, every merge would add an error, and with
# more devices there would be more errors. `usp_jax` carries both in float32 and rounds
# once, at the end. The next plot compares the two.


# %%
def largest_error(chunks, dtype):
    """The error of a carry that is rounded to `dtype` after each merge."""
    out, lse = nothing
    for piece in np.split(np.arange(T), chunks):
        out, lse = merge(out, lse, *attend(piece))
        out, lse = (x.astype(dtype).astype(jnp.float32) for x in (out, lse))
    return float(jnp.sqrt(jnp.mean((out - expected) ** 2)))


counts = [1, 2, 4, 8, 16, 32]
errors = {
    name: [largest_error(n, name) for n in counts] for name in ("bfloat16", "float32")
}
assert errors["bfloat16"][-1] > 2 * errors["bfloat16"][0]
assert max(errors["float32"]) < 1e-6


# %%
def draw_errors():
    figure, axes = plt.subplots(figsize=(7, 3.4))
    for color, (name, values) in zip(("C2", "C0"), errors.items(), strict=True):
        axes.plot(counts, values, "o-", color=color, label=f"carried in {name}")
    axes.set(xscale="log", yscale="log", xlabel="chunks", ylabel="error (RMS)")
    axes.set_xticks(counts, counts)
    axes.minorticks_off()
    axes.legend()


draw_errors()

# %% [markdown]
# ## Gradients merge too
#
# Training needs the gradients of q, k and v. Once the **final** lse is known, a chunk
# can compute its own weights without the others, $p_j = e^{x_j - L}$. With
# $\delta = \text{dout} \cdot \text{out}$ the gradient of a logit is
# $p_j (\text{dout} \cdot v_j - \delta)$, and dq is the sum of the chunks'
# contributions. No chunk needs the keys of another.

# %%
dout = jax.random.normal(jax.random.key(2), (B, T, N, H))
out, lse = usp_jax.flash_attention(q, k, v, return_residual=True)
delta = jnp.sum(dout * out, -1)

dq = jnp.zeros_like(q)
for start in range(0, T, 16):
    chunk_k, chunk_v = (x[:, start : start + 16] for x in (k, v))
    logits = jnp.einsum("BTNH,BSNH->BTNS", q, chunk_k) / np.sqrt(H)
    p = jnp.exp(logits - lse[..., None])
    dp = jnp.einsum("BTNH,BSNH->BTNS", dout, chunk_v)
    dlogits = p * (dp - delta[..., None])
    dq += jnp.einsum("BTNS,BSNH->BTNH", dlogits, chunk_k) / np.sqrt(H)


def loss(q):
    return jnp.sum(jax.nn.dot_product_attention(q, k, v) * dout)


assert np.allclose(dq, jax.grad(loss)(q), atol=1e-5)

# %% [markdown]
# ## On eight devices
#
# From here it is a small step to *ring attention*. Each of eight devices keeps its
# eighth of the queries and passes its keys and values on to the next device; after
# eight steps every query has met every key. This is the whole algorithm.

# %%
mesh = jax.make_mesh((8,), ("ring",), axis_types=(jax.sharding.AxisType.Auto,))
RIGHT = [(i, (i + 1) % 8) for i in range(8)]


@jax.jit
@jax.shard_map(mesh=mesh, in_specs=jax.P(None, "ring"), out_specs=jax.P(None, "ring"))
def ring_attention(q, k, v):
    carry = usp_jax.flash_attention(q, k, v, return_residual=True)  # its own keys
    for _ in range(7):
        k, v = lax.ppermute((k, v), "ring", RIGHT)
        carry = merge(*carry, *usp_jax.flash_attention(q, k, v, return_residual=True))
    return carry[0]


assert np.allclose(ring_attention(q, k, v), expected, atol=1e-6)
print("eight devices, each with one eighth of the keys, agree with one device")

# %% [markdown]
# The library's ring (`usp_jax/ring/`) is this loop with masks, its own gradient, and
# each hop started before the chunk that hides it is computed. The next notebook draws
# which device holds what at each step, and combines the ring with a second way to
# split attention.
