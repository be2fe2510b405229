"""`python -m train.export RUN_DIR OUT`: a run's model as a Hugging Face checkpoint.

Of a checkpoint the parameters alone are read, and the run may go on meanwhile. The
run's tokenizer.json, if it has one, is not copied.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import tyro
from jax.sharding import Mesh

import usp_jax
from train.trained import load_model, read_config
from usp_jax.models import hf
from usp_jax.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes the newest checkpoint of a run as config.json and safetensors files.

    Attributes:
      run_dir: of `python -m train`.
      out: a folder without a checkpoint.
      dtype: of the tensors: float32, or bfloat16.
      step: of the checkpoint; None is the newest.
    """

    run_dir: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    dtype: str = "float32"
    step: int | None = None


def export(options: Export) -> int:
    """Writes the checkpoint and returns its step.

    Raises:
      ValueError: no run or no such checkpoint there, or `out` is taken.
    """
    mesh = _all_devices(read_config(options.run_dir))
    step, model = load_model(options.run_dir, options.step, mesh)
    hf.save(model, options.out, dtype=options.dtype)
    return step


def _all_devices(config: LlamaConfig) -> Mesh:
    """As many of them as the parameters can be split over."""
    count = jax.device_count()
    while config.d_model % count:
        count -= 1
    return usp_jax.make_mesh(fsdp=count, devices=jax.devices()[:count])


def main() -> None:
    """Exits with 2 for what a user can put right."""
    options = tyro.cli(Export, prog="python -m train.export")
    try:
        step = export(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"step {step} of {options.run_dir} is in {options.out}")


if __name__ == "__main__":
    main()
