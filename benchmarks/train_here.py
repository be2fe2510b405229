"""Measure the MFU of a training step with LLaMA3-8B-shaped layers on one device.

    python -m benchmarks.train_here                          # on a GPU or a TPU
    python -m benchmarks.train_here --lengths 65536 --remat attention --layers 8
    python -m benchmarks.train_here --toy                    # anywhere: a tiny model

Prints JSON lines: first the machine, then one line per length, remat policy and
attention implementation with the median time of a training step, the three MFUs of
`usp_jax.plan.flops`, tokens per second and the peak memory. `--layers` sets the number
of layers. The vocabulary shrinks with it and so keeps its share of the work of the
whole model. Tokens are random, one sequence per training step. A case that does not fit
reports so. Needs `pip install '.[train]'`.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import usp_jax
from benchmarks.timing import machine
from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig
from train.data.batches import place
from train.data.corpus import PADDING
from train.log.flops import step_flops
from train.log.metrics import rates
from train.state import first_state
from train.step import compile_step, make_step
from usp_jax.models.presets import PRESETS
from usp_jax.plan.machines import peak_of_kind

STEPS = 1000  # The length of the run, for the schedule of the learning rate.


def config_of(
    preset: str, tokens: int, options: dict[str, Any], offload: bool
) -> Config:
    """Returns a run of some layers of a preset and the same share of its vocabulary.

    Args:
      preset: a name of `PRESETS`.
      tokens: the sequence length.
      options: fields of `ModelConfig`, including `num_layers`.
      offload: whether to keep the optimizer state in host memory.
    """
    model = vars(PRESETS[preset])
    share = options["num_layers"] / model["num_layers"]
    vocab_size = -(-int(model["vocab_size"] * share) // 128) * 128
    return Config(
        model=ModelConfig(**model | {"vocab_size": vocab_size} | options),
        steps=STEPS,
        sequence_length=tokens,
        batch_size=1,
        run_dir=Path("unused"),
        mesh=MeshConfig(),
        optimizer=OptimizerConfig(offload=offload),
    )


def random_batch(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns a batch with one document of random tokens per row."""
    shape = config.batch_size, config.sequence_length
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    rows = {name: np.zeros(shape, np.int32) for name in PADDING}
    rows["tokens"] = tokens.astype(np.int32)
    rows["labels"] = np.roll(rows["tokens"], -1, 1)
    return place(rows, config.stored_layout, mesh)


def measure(config: Config, steps: int) -> dict[str, Any]:
    """Times `steps` training steps after two that do not count."""
    mesh = usp_jax.make_mesh(devices=jax.devices()[:1], **config.mesh.sizes)
    graphdef, state = first_state(config, mesh)
    batch = random_batch(config, mesh)
    began = time.perf_counter()
    step = compile_step(make_step(config, graphdef), state, batch)
    compiled = time.perf_counter() - began
    seconds = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    peak = peak_of_kind(jax.devices()[0].device_kind, config.dtype)
    median = statistics.median(seconds[2:])
    figures = rates(median, config.sequence_length, step_flops(config), peak)
    return {"compile_seconds": compiled, "steps": seconds, "loss": loss} | figures


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yields one line per case."""
    for tokens, remat, implementation in itertools.product(
        options.lengths, options.remat, options.implementations
    ):
        model = {
            "num_layers": options.layers,
            "remat": remat,
            "mlp_tile": options.mlp_tile,
            "implementation": implementation,
        }
        config = config_of(options.preset, tokens, model, options.offload)
        head = {"tokens": tokens, "vocab_size": config.model.vocab_size} | model
        head["offload"] = options.offload
        # A case that does not fit must not stop the next one.
        try:
            yield head | measure(config, options.steps)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            yield head | {"failed": " ".join(str(error).split())[:300]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    lengths = [32768, 65536, 131072]
    parser.add_argument("--preset", default="llama3-8b", choices=PRESETS)
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--remat", nargs="+", default=["attention"])
    parser.add_argument("--implementations", nargs="+", default=[None])
    parser.add_argument("--mlp-tile", type=int)
    parser.add_argument("--offload", action="store_true", help="the optimizer state")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--toy", action="store_true", help="a tiny model, 256 tokens")
    options = parser.parse_args(arguments)
    if options.toy:
        options.preset, options.lengths, options.layers = "tiny", [256], 1
        options.steps = 1
    print(json.dumps(machine()), flush=True)
    for line in lines(options):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
