"""`python -m train.export RUN_DIR OUT`: exports a model as a Hugging Face checkpoint.

Only the parameters of the run's checkpoint are exported, and the run may continue
meanwhile. A damaged checkpoint is refused. The run's tokenizer.json, if it has one, is
not copied.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import tyro
from jax.sharding import Mesh

import usp_jax
from train.trained import load_model, read_config
from train.words import check_no_empty_value
from usp_jax.models import hf
from usp_jax.models.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Export:
    """Exports a checkpoint of a run as config.json and safetensors files.

    Attributes:
      run_dir: folder of a run of `python -m train`.
      out: folder to write to; it must not hold a checkpoint.
      dtype: dtype of the tensors, float32 or bfloat16.
      step: step of the checkpoint; None is the newest.
    """

    run_dir: tyro.conf.Positional[Path]
    out: tyro.conf.Positional[Path]
    dtype: str = "float32"
    step: int | None = None


def export(options: Export) -> int:
    """Exports the checkpoint and returns its step.

    Raises:
      ValueError: there is no such run or checkpoint, the checkpoint is damaged, or
        `out` is taken.
      OSError: `out` cannot be written.
    """
    mesh = _all_devices(read_config(options.run_dir, options.step))
    step, model = load_model(options.run_dir, options.step, mesh)
    hf.save(model, options.out, dtype=options.dtype)
    return step


def _all_devices(config: LlamaConfig) -> Mesh:
    """A mesh of as many devices as the parameters can be split over."""
    count = jax.device_count()
    while config.d_model % count:
        count -= 1
    return usp_jax.make_mesh(fsdp=count, devices=jax.devices()[:count])


def main() -> None:
    """Exports a run; exits with 2 for errors that the user can fix, 1 for OS errors."""
    try:
        check_no_empty_value(sys.argv[1:])
        options = tyro.cli(Export, prog="python -m train.export")
        step = export(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    print(f"exported step {step} of {options.run_dir} to {options.out}")


if __name__ == "__main__":
    main()
