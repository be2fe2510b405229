# %% [markdown]
# # 4. Make your Flax model long
#
# You have a Flax model, and its sequences no longer fit on one device. This notebook
# changes one argument of its attention layer, for NNX and for Linen, and checks that
# the outputs and all gradients stay the same.
#
# ```diff
#   layer = nnx.MultiHeadAttention(
#       8, 64, rngs=rngs,
# +     attention_fn=usp_jax.nn.attention_fn(mesh, is_causal=True, layout="zigzag"),
#   )
# ```

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen, nnx

import usp_jax
from usp_jax.nn import SequenceMask, attention_fn

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
plt.style.use("petroff10")
plt.rcParams.update({"figure.dpi": 80, "figure.constrained_layout.use": True})

# %% [markdown]
# ## Before
#
# A minimal language model: embeddings of tokens and positions, one attention layer,
# and logits. We shall change only `attend`; by default it is Flax's own attention,
# which needs a causal mask of T × T entries.

# %%
VOCABULARY, FEATURES, HEADS, LONGEST = 64, 64, 8, 4096


class Model(nnx.Module):
    def __init__(self, rngs, attend=nnx.dot_product_attention):
        self.tokens = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.positions = nnx.Embed(LONGEST, FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS, FEATURES, decode=False, attention_fn=attend, rngs=rngs
        )
        self.logits = nnx.Linear(FEATURES, VOCABULARY, rngs=rngs)

    def __call__(self, tokens, positions, mask=None):
        x = self.tokens(tokens) + self.positions(positions)
        return self.logits(x + self.attention(x, mask=mask))


def loss(model, tokens, targets, positions, mask=None):
    logits = jax.nn.log_softmax(model(tokens, positions, mask))
    return -jnp.take_along_axis(logits, targets[..., None], -1).mean()


T = 512
text = np.random.default_rng(0).integers(0, VOCABULARY, (2, T + 1), np.int32)
tokens, targets = text[:, :-1], text[:, 1:]  # the next token is the target
positions = np.arange(T, dtype=np.int32)[None]

before = Model(nnx.Rngs(0))
mask = nnx.make_causal_mask(tokens)
loss_before, grads_before = nnx.jit(nnx.value_and_grad(loss))(
    before, tokens, targets, positions, mask
)
print(f"loss {loss_before:.6f}, with a mask of {mask.size:,} entries")

# %% [markdown]
# ## After
#
# Three steps:
#
# 1. **A mesh.** Eight devices as `ring=4` × `ulysses=2` (see
#    [notebook 2](02_ulysses_and_ring.ipynb)).
# 2. **The attention.** `attention_fn(mesh, is_causal=True, layout="zigzag")` replaces
#    Flax's function. The mask is now an option, not an array.
# 3. **The order.** Permute the *inputs* of the model, once: tokens, targets,
#    positions. Everything else in a transformer works on one token at a time and is
#    not affected. Shift the targets first, as above: in the new order a token's
#    neighbour is not the next token of the text.

# %%
mesh = usp_jax.make_mesh(ring=4, ulysses=2)
after = Model(nnx.Rngs(0), attention_fn(mesh, is_causal=True, layout="zigzag"))

sharding = jax.NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
stored = [
    jax.device_put(usp_jax.to_layout(x, "zigzag", mesh), sharding)
    for x in (tokens, targets)
]
stored_positions = usp_jax.layout_positions(T, "zigzag", mesh)[None]

loss_after, grads_after = nnx.jit(nnx.value_and_grad(loss))(
    after, *stored, stored_positions
)
print(f"loss {loss_after:.6f}, with the sequence split over {mesh.size} devices")
assert np.isclose(loss_before, loss_after, rtol=1e-6)

# %% [markdown]
# The parameters are the same and have the same names, so a checkpoint of one model
# works for the other. The gradients of all parameters agree.


# %%
def largest_differences(expected, actual):
    """The largest difference in each parameter's gradient, over its largest value."""
    names = [
        ".".join(str(key.key) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(expected)
    ]
    pairs = zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True)
    found = {
        name: float(abs(a - b).max() / abs(a).max())
        for name, (a, b) in zip(names, pairs, strict=True)
    }
    # The keys' bias has no gradient: it shifts all logits of a query alike, which a
    # softmax ignores. Its computed gradient is only rounding error.
    return {name: x for name, x in found.items() if not name.endswith("key.bias")}


def check_gradients(expected, actual):
    differences = largest_differences(expected, actual)
    for name, difference in differences.items():
        assert difference < 1e-4, name
    worst = max(differences, key=differences.get)
    print(
        f"{len(differences)} gradients agree; the worst, {worst}, to "
        f"{differences[worst]:.0e}"
    )


check_gradients(nnx.to_pure_dict(grads_before), nnx.to_pure_dict(grads_after))

# %% [markdown]
# ## What it saves
#
# The compiler reports how much memory each model needs. We compile the gradient at
# several lengths, without running it, and read how many bytes of temporary memory
# **one device** needs.


# %%
def temporary_bytes(model, length, sharding=None):
    """Bytes that one device needs for the gradients, in addition to the parameters."""
    graphdef, params = nnx.split(model)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)
    # Flax's own attention takes a mask; ours has is_causal=True.
    masks = [jax.ShapeDtypeStruct((1, 1, length, length), jnp.float32)]
    masks = masks if sharding is None else []

    def total(params, *inputs):
        return loss(nnx.merge(graphdef, params), *inputs)

    program = jax.jit(jax.grad(total)).lower(params, row, row, row, *masks).compile()
    return program.memory_analysis().temp_size_in_bytes


lengths = [1024, 2048, 4096]
needed = {
    "Flax's attention, one device": [temporary_bytes(before, n) for n in lengths],
    "usp_jax, eight devices": [temporary_bytes(after, n, sharding) for n in lengths],
}


# %%
def draw_memory():
    figure, axes = plt.subplots(figsize=(7, 3.8))
    for (name, values), style in zip(needed.items(), ("s--", "o-"), strict=True):
        axes.plot(lengths, np.array(values) / 2**20, style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="MiB a device")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.minorticks_off()
    axes.legend()


draw_memory()

# %% [markdown]
# Flax's attention stores the table of all pairs, so twice the tokens need four times
# the memory. Ours grows no faster than the length, and eight devices share it.

# %%
growth = {name: values[-1] / values[-2] for name, values in needed.items()}
for (name, factor), values in zip(growth.items(), needed.values(), strict=True):
    print(f"{name}: {values[-1] / 2**20:,.0f} MiB at 4,096 tokens, x {factor:.1f}")
plain, ours = growth.values()
assert plain > 3.5 and ours < 2.1

# %% [markdown]
# ## Packed documents
#
# Where you passed the layer a dense mask for documents or padding, pass a
# `SequenceMask`: the number of each token's document, or -1 for padding.

# %%
documents = np.repeat([[0, 1, 2, -1]], [200, 150, 130, 32], axis=1)
same = documents[:, None, :, None] == documents[:, None, None, :]
dense = mask[:1] * same * (documents >= 0)[:, None, None, :]

expected = nnx.jit(before)(tokens[:1], positions, dense)
stored_documents = usp_jax.to_layout(documents.astype(np.int32), "zigzag", mesh)
actual = nnx.jit(after)(
    stored[0][:1], stored_positions, SequenceMask(segment_ids=stored_documents)
)
actual = usp_jax.from_layout(actual, "zigzag", mesh)
real = documents[0] >= 0
assert np.allclose(expected[:, real], actual[:, real], atol=1e-4)
print("three documents and some padding: equal")

# %% [markdown]
# ## What it refuses
#
# An option that attention over a split sequence cannot honour raises an error, which
# says what to do instead.

# %%
try:
    after(*stored[:1], stored_positions, mask)
except ValueError as error:
    print(error)
else:
    raise AssertionError("a dense mask was taken")

# %% [markdown]
# If you forget step 3, nothing fails, but the model sees the tokens in the wrong order,
# and the loss is different. When you change a model, make this comparison.

# %%
wrong = nnx.jit(loss)(after, tokens, targets, positions)
assert not np.isclose(wrong, loss_before, rtol=1e-6)
print(f"loss {wrong:.6f} in the wrong order, {loss_before:.6f} is right")

# %% [markdown]
# ## The same in Linen
#
# `flax.linen.MultiHeadDotProductAttention` takes the same function. Here we compare the
# output and all gradients of the layer alone.

# %%
x = jax.random.normal(jax.random.key(1), (2, T, FEATURES))
weight = jax.random.normal(jax.random.key(2), x.shape)

before = linen.MultiHeadDotProductAttention(HEADS)
after = linen.MultiHeadDotProductAttention(
    HEADS, attention_fn=attention_fn(mesh, is_causal=True, layout="zigzag")
)
params = before.init(jax.random.key(0), x)


def output_and_gradients(layer, x, weight, **options):
    def total(params):
        out = layer.apply(params, x, **options)
        return jnp.sum(out * weight), out

    return jax.jit(jax.grad(total, has_aux=True))(params)


grads_before, out_before = output_and_gradients(before, x, weight, mask=mask)
grads_after, out_after = output_and_gradients(
    after, *(usp_jax.to_layout(a, "zigzag", mesh) for a in (x, weight))
)
out_after = usp_jax.from_layout(out_after, "zigzag", mesh)
assert np.allclose(out_before, out_after, atol=1e-5)
check_gradients(grads_before, grads_after)

# %% [markdown]
# For a new model, `usp_jax.nn.USPAttention` is a layer with grouped heads, and with
# RoPE whose positions follow the layout; `usp_jax.models.llama` is a whole model.
# [Notebook 5](05_choose_a_mesh.ipynb) chooses the mesh.
