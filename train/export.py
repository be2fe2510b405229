"""`python -m train.export RUN_DIR OUT`: a run's model as a Hugging Face checkpoint.

Of a checkpoint the parameters alone are read, and the run may go on meanwhile. The
run's tokenizer.json, if it has one, is not copied.
"""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tyro
from jax.sharding import Mesh

import usp_jax
from usp_jax.models import hf
from usp_jax.models.llama import Llama, LlamaConfig, RopeScaling
from usp_jax.models.sharding import parameter_shapes, parameter_shardings


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
    config = read_config(options.run_dir)
    mesh = _all_devices(config)
    shardings = parameter_shardings(config, mesh)
    wanted = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=shardings[name])
        for name, shape in parameter_shapes(config).items()
    }
    step, params = _restore(options, wanted)
    model = Llama.of_parameters(config, params, mesh=mesh)
    hf.save(model, options.out, dtype=options.dtype)
    return step


def read_config(run_dir: Path) -> LlamaConfig:
    """The model of a run, as its config.json tells it.

    Raises:
      ValueError: there is no run.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise ValueError(f"run_dir={run_dir} holds no run: it has no {path.name}")
    told = json.loads(path.read_text())
    model = told["model"]
    scaling = model.get("rope_scaling")
    if scaling is not None:
        kinds = {kind.__name__: kind for kind in typing.get_args(RopeScaling)}
        model["rope_scaling"] = kinds[scaling.pop("type")](**scaling)
    return LlamaConfig(**model, dtype=told["dtype"])


def _all_devices(config: LlamaConfig) -> Mesh:
    """As many of them as the parameters can be split over."""
    count = jax.device_count()
    while config.d_model % count:
        count -= 1
    return usp_jax.make_mesh(fsdp=count, devices=jax.devices()[:count])


def _restore(options, wanted):
    folder = (options.run_dir / "checkpoints").absolute()
    if not folder.exists():
        raise ValueError(f"run_dir={options.run_dir} has no checkpoint yet")
    # Read only, so that what a running run is writing stays.
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
        steps = sorted(manager.all_steps())
        step = options.step if options.step is not None else max(steps, default=None)
        if step not in steps:
            raise ValueError(
                f"run_dir={options.run_dir} has no checkpoint of step {step}, it has "
                f"{steps}"
            )
        tree = {"params": wanted}
        state = ocp.args.PyTreeRestore(
            tree,
            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
            partial_restore=True,
        )
        found = manager.restore(step, args=ocp.args.Composite(state=state))
    return step, found.state["params"]


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
