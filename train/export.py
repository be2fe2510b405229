"""`python -m train.export RUN_DIR OUT`: exports a model as a Hugging Face checkpoint.

Only the parameters of the run's checkpoint are exported, and the run may continue
meanwhile. A damaged checkpoint is refused. The tokenizer's files and a
generation_config.json are written too (`tokenizer_files.py`).
"""

import dataclasses
import sys
from pathlib import Path

import tyro

from train.config import MeshConfig
from train.source import Source
from train.tokenizer_files import serving_files
from train.trained import read_run
from train.words import check_no_empty_value
from usp_jax.command_line import alive
from usp_jax.models import hf


@dataclasses.dataclass(frozen=True)
class Export:
    """Exports a checkpoint of a run as config.json and safetensors files.

    Adapters (LoRA) are merged into the weights in float32.

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
    # Named by its option, if it is no run.
    run = read_run(options.run_dir, options.step)
    source = Source.open(options.run_dir, options.step)
    if source.config.lora is not None:
        # Merged matrices have the bits of the export, not of the frozen weights.
        config = dataclasses.replace(source.config, param_dtype=options.dtype)
        source = dataclasses.replace(source, config=config)
    vocabulary, start = source.vocabulary(), run.get("init_from")
    like = None if start is None else Path(start)
    if like is not None and not (like / "config.json").exists():
        like = None
    # A template that the run was given replaces that of its weights.
    own = None if source.template is None else source.path
    folders = [folder for folder in (own, like, source.folder) if folder is not None]
    with alive("exporting", on_stderr=True):
        step, model = source.load(MeshConfig(), None)
        # It is a run.
        assert step is not None
        hf.save(
            model,
            options.out,
            dtype=options.dtype,
            like=like,
            max_length=source.length,
            texts=serving_files(vocabulary, folders, source.length),
        )
    return step


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
