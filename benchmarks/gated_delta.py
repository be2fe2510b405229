"""The gated delta rule on a CPU: time and memory, block sizes, and what a ring costs.

    python -m benchmarks.gated_delta time     # one device, 8K tokens, side by side
    python -m benchmarks.gated_delta tiles    # sizes of blocks and segments
    python -m benchmarks.gated_delta ring     # compiled for 8 fake devices, 64K tokens
    python -m benchmarks.gated_delta errors   # 16-bit errors by ring size
    python -m benchmarks.gated_delta layer    # the layer and Qwen3-Next's (torch, flax)

Each prints JSON lines. `time` compares usp_jax with the rule by its definition (a scan
over tokens) and, where torch and transformers are installed, with transformers'
`torch_chunk_gated_delta_rule`; each runs in a process of its own, whose peak resident
memory is taken less what it had before the first call. The head sizes are those of
Qwen3-Next, with 2 heads of q and k and 4 of v.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import usp_jax
from benchmarks.timing import machine
from usp_jax.compiled import by_kind, collectives
from usp_jax.delta.contract import DeltaTokens, Tiles
from usp_jax.delta.reference import reference_gated_delta
from usp_jax.delta.xla import XLA

TOKENS, HEADS, VALUE_HEADS, SIZE = 8192, 2, 4, 128
CONTENDERS = ("usp_jax", "scan", "transformers")
REPEATS = 3
ROOT = pathlib.Path(__file__).parent.parent


def inputs(tokens: int = TOKENS, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    """q, k, v, log decays, betas and the cotangent of out, of one row."""
    rng = np.random.default_rng(0)
    shapes = [(1, tokens, n, SIZE) for n in (HEADS, HEADS, VALUE_HEADS, VALUE_HEADS)]
    q, k, v, dout = (rng.standard_normal(s, np.float32) for s in shapes)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    decay, beta = rng.random((2, 1, tokens, VALUE_HEADS), np.float32)
    arrays = q * SIZE**-0.5, k, v, -0.1 * decay, beta, dout
    return tuple(np.asarray(jnp.asarray(x, dtype)) for x in arrays)


def of_jax(rule, backward: bool):
    """The jitted rule as a function of `inputs`, and its inputs."""

    def forward(q, k, v, decay, beta):
        return rule(q, k, v, log_decay=decay, beta=beta)[0]

    def both(*arrays):
        out, pull = jax.vjp(forward, *arrays[:-1])
        return out, *pull(arrays[-1])

    def run(*arrays):
        results = both(*arrays) if backward else (forward(*arrays[:-1]),)
        return results

    jitted, arrays = jax.jit(run), tuple(map(jnp.asarray, inputs()))
    return lambda: [np.asarray(x) for x in jax.block_until_ready(jitted(*arrays))]


def of_transformers(backward: bool):
    """transformers' chunked rule; its layer repeats q and k before."""
    import torch
    from transformers.models.qwen3_next import modeling_qwen3_next

    arrays = [torch.tensor(x, requires_grad=backward) for x in inputs()]

    def run():
        q, k, v, decay, beta, dout = arrays
        groups = VALUE_HEADS // HEADS
        # It scales the queries itself.
        q = q * SIZE**0.5
        q, k = (x.repeat_interleave(groups, 2) for x in (q, k))
        out, _ = modeling_qwen3_next.torch_chunk_gated_delta_rule(q, k, v, decay, beta)
        if not backward:
            return [out.detach().numpy()]
        grads = torch.autograd.grad(out, arrays[:-1], dout)
        return [x.detach().numpy() for x in (out, *grads)]

    return run


def contend(name: str, backward: bool) -> dict[str, object]:
    """Times one contender in this process."""
    if name == "transformers":
        run = of_transformers(backward)
    else:
        rule = {"usp_jax": usp_jax.gated_delta, "scan": reference_gated_delta}[name]
        run = of_jax(rule, backward)
    before = peak_bytes()
    results = run()
    return {
        "contender": name,
        "pass": "forward_backward" if backward else "forward",
        **fastest(run),
        "peak_mib": round((peak_bytes() - before) / 2**20),
        # Of out and of each gradient, to see that all compute the same.
        "rms": [float(np.sqrt(np.mean(np.square(x)))) for x in results],
    }


def fastest(run) -> dict[str, float]:
    """The least seconds of some runs, and the least CPU seconds of all threads.

    Other programs on the machine change the latter less.
    """
    seconds, cpu_seconds = [], []
    for _ in range(REPEATS):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return {
        "seconds_min": round(min(seconds), 3),
        "cpu_seconds_min": round(min(cpu_seconds), 3),
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compare() -> None:
    """Each contender and pass in its own process."""
    print(json.dumps(machine() | {"tokens": TOKENS, "cores": os.cpu_count()}))
    for backward in ("", "backward"):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "benchmarks.gated_delta", "one", name]
            child = subprocess.run(
                [*command, *backward.split()],
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
            )
            missing = {"contender": name, "error": child.returncode}
            print(child.stdout.strip() or json.dumps(missing), flush=True)


def tiles() -> None:
    """Seconds of a forward and a backward by tiles, of one shard of a ring."""
    print(json.dumps(machine() | {"tokens": TOKENS, "cores": os.cpu_count()}))
    q, k, v, decay, beta, dout = map(jnp.asarray, inputs())
    v, decay, beta, dout = (
        x.reshape(1, TOKENS, HEADS, VALUE_HEADS // HEADS, *x.shape[3:])
        for x in (v, decay, beta, dout)
    )
    tokens = DeltaTokens(q, k, v, decay, beta)
    state = jnp.zeros((1, HEADS, VALUE_HEADS // HEADS, SIZE, SIZE))

    for block in (32, 64, 128):
        for blocks in (4, 16, 64):
            cut = Tiles(block, blocks)

            @jax.jit
            def both(tokens, state, dout, cut=cut):
                out, after, kept = XLA.run(tokens, state, cut)
                return out, XLA.run_backward(tokens, kept, dout, after, cut)

            program = both.lower(tokens, state, dout).compile()
            arrays = tokens, state, dout
            jax.block_until_ready(program(*arrays))

            def run(program=program, arrays=arrays):
                jax.block_until_ready(program(*arrays))

            memory = program.memory_analysis().temp_size_in_bytes
            line = {"block": block, "blocks": blocks, **fastest(run)}
            print(json.dumps(line | {"temporary_mib": memory // 2**20}), flush=True)


def ring() -> None:
    """Bytes that travel, and temporaries, of a forward and backward of 64K tokens."""
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps(machine() | {"tokens": 8 * TOKENS}))
    for degree, ulysses in ((1, 1), (8, 1), (4, 2), (2, 4)):
        for layout in ("contiguous", "zigzag"):
            mesh = usp_jax.make_mesh(ring=degree, ulysses=ulysses)
            length = TOKENS * degree * ulysses
            sharding = jax.NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
            arrays = [
                jax.ShapeDtypeStruct(
                    (1, length, *x.shape[2:]), x.dtype, sharding=sharding
                )
                for x in inputs(8)
            ]

            def both(q, k, v, decay, beta, dout, mesh=mesh, layout=layout):
                def forward(q, k, v, decay, beta):
                    gates = {"log_decay": decay, "beta": beta}
                    split = {"layout": layout, "mesh": mesh}
                    return usp_jax.gated_delta(q, k, v, **gates, **split)[0]

                out, pull = jax.vjp(forward, q, k, v, decay, beta)
                return out, pull(dout)

            program = jax.jit(both).lower(*arrays).compile()
            sent = by_kind(collectives(program)).items()
            line = {
                "ring": degree,
                "ulysses": ulysses,
                "layout": layout,
                "sent_mib": {k: round(x.wire_bytes / 2**20, 2) for k, x in sent},
                "temporary_mib": program.memory_analysis().temp_size_in_bytes // 2**20,
            }
            print(json.dumps(line), flush=True)


def errors() -> None:
    """Relative errors of out and the gradients in bfloat16, by ring size."""
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps(machine() | {"tokens": 2048}))
    arrays = tuple(jnp.asarray(x) for x in inputs(2048, "bfloat16"))
    names = "out", "dq", "dk", "dv", "dlog_decay", "dbeta"

    def results(rule, arrays):
        def forward(q, k, v, decay, beta):
            return rule(q, k, v, log_decay=decay, beta=beta)[0]

        out, pull = jax.vjp(forward, *arrays[:-1])
        return out, *pull(arrays[-1].astype(out.dtype))

    wide = [x.astype("float32") for x in arrays]
    exact = jax.jit(lambda arrays: results(reference_gated_delta, arrays))(wide)
    for degree in (1, 2, 4, 8):
        mesh = usp_jax.make_mesh(ring=degree)

        def rule(*arrays, mesh=mesh, **gates):
            return usp_jax.gated_delta(*arrays, **gates, layout="zigzag", mesh=mesh)

        stored = [usp_jax.to_layout(x, "zigzag", mesh) for x in arrays]
        actual = jax.jit(lambda arrays, rule=rule: results(rule, arrays))(stored)
        line = {"dtype": "bfloat16", "ring": degree}
        for name, x, want in zip(names, actual, exact, strict=True):
            natural = np.float32(usp_jax.from_layout(x, "zigzag", mesh))
            line[name] = float(np.std(natural - want) / np.std(want))
        print(json.dumps(line), flush=True)


def layer() -> None:
    """The difference of `USPGatedDelta` and Qwen3-Next's layer, with its weights."""
    import torch
    from flax import nnx
    from transformers import Qwen3NextConfig, __version__
    from transformers.models.qwen3_next import modeling_qwen3_next

    from usp_jax.nn import USPGatedDelta

    width, n, m, h, v, taps = 64, 2, 4, 32, 16, 4
    config = Qwen3NextConfig(
        hidden_size=width,
        linear_num_key_heads=n,
        linear_num_value_heads=m,
        linear_key_head_dim=h,
        linear_value_head_dim=v,
        linear_conv_kernel_dim=taps,
    )
    torch.manual_seed(0)
    theirs = modeling_qwen3_next.Qwen3NextGatedDeltaNet(config, 0)
    weights = {name: x.detach().numpy() for name, x in theirs.named_parameters()}
    ours = USPGatedDelta(
        width, n, num_v_heads=m, head_size=h, value_size=v, rngs=nnx.Rngs(0)
    )
    qkvz = weights["in_proj_qkvz.weight"].reshape(n, -1, width).transpose(2, 0, 1)
    ours.qkv.kernel[...], z = np.split(qkvz, [2 * h + m // n * v], 2)
    ours.gate.kernel[...] = z.reshape(width, m, v)
    # By head of q and k: betas of its heads of v, then their steps.
    gates = weights["in_proj_ba.weight"].reshape(n, 2, m // n, width)
    ours.gates.kernel[...] = gates[:, ::-1].transpose(3, 0, 2, 1).reshape(width, m, 2)
    conv = np.split(weights["conv1d.weight"][:, 0], [n * h, 2 * n * h])
    by_head = np.concatenate([x.reshape(n, -1, taps) for x in conv], 1)
    ours.conv[...] = by_head.reshape(-1, taps)
    ours.o.kernel[...] = weights["out_proj.weight"].T.reshape(m, v, width)
    ours.log_rate[...], ours.time_bias[...] = weights["A_log"], weights["dt_bias"]
    ours.norm[...] = weights["norm.weight"]
    x = np.random.default_rng(0).standard_normal((2, 200, width), np.float32)
    expected = theirs(torch.tensor(x)).detach().numpy()
    error = np.abs(np.asarray(ours(jnp.asarray(x))) - expected).max()
    line = {"transformers": __version__, "largest": float(np.abs(expected).max())}
    print(json.dumps(machine() | line | {"largest_error": float(error)}))


def main() -> None:
    commands = {
        "time": compare,
        "tiles": tiles,
        "ring": ring,
        "errors": errors,
        "layer": layer,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=(*commands, "one"))
    parser.add_argument("contender", nargs="?", choices=CONTENDERS)
    parser.add_argument("direction", nargs="?", choices=("backward",))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.what == "one":
        print(json.dumps(contend(args.contender, args.direction == "backward")))
    else:
        commands[args.what]()


if __name__ == "__main__":
    main()
