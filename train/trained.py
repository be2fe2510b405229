"""Loads the model of a run from a checkpoint; the run may continue meanwhile.

Only the parameters of the checkpoint are restored, but the digests of all its files are
checked before.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from train.checkpoint import one_line
from train.config import LoraConfig
from train.digests import damage, has_digests
from train.model_record import model_fields
from train.run_dir import RunRecord, checkpoint_folders, find_record
from train.state import Params
from usp_jax.models.llama import Llama, LlamaConfig
from usp_jax.models.lora import merged
from usp_jax.models.parameters import parameter_shapes, stored_dtype
from usp_jax.models.sharding import parameter_shardings


def load_model(
    run_dir: Path, step: int | None, mesh: Mesh, config: LlamaConfig | None = None
) -> tuple[int, Llama]:
    """Loads the model of a run's checkpoint on a mesh, with its adapters merged.

    Args:
      run_dir: folder of the run.
      step: step of the checkpoint; None is the newest.
      mesh: the mesh to split the model over.
      config: the run's model, computed in another way; None is as the run does.

    Returns:
      The step of the checkpoint, and the model.

    Raises:
      ValueError: there is no such run or checkpoint, the checkpoint is damaged, or the
        mesh cannot split the model.
    """
    config = read_config(run_dir, step) if config is None else config
    shardings = parameter_shardings(config, mesh)
    wanted = {
        name: jax.ShapeDtypeStruct(
            shape, stored_dtype(name, config.stored_dtype), sharding=shardings[name]
        )
        for name, shape in parameter_shapes(config).items()
    }
    step, params = _restore(run_dir, step, wanted)
    return step, merged(Llama.of_parameters(config, params, mesh=mesh))


def read_config(run_dir: Path, step: int | None = None) -> LlamaConfig:
    """Reads the model configuration of a run, as `read_run` does.

    Raises:
      ValueError: there is no run.
    """
    return model_config(read_run(run_dir, step))


def model_config(record: RunRecord) -> LlamaConfig:
    """Returns the model configuration in the record of a run."""
    model = model_fields(record["model"])
    # These are chosen for the run's mesh, not the caller's.
    for name in ("ring_schedule", "ulysses_chunks"):
        model.pop(name, None)
    lora = record.get("lora", {})
    model["lora"] = LoraConfig(
        lora.get("rank"), lora.get("alpha"), tuple(lora.get("targets", ()))
    ).adapters
    return LlamaConfig(**model, dtype=record["dtype"])


def read_run(run_dir: Path, step: int | None = None) -> RunRecord:
    """Reads the record that a checkpoint was made with, or the run's config.json.

    Args:
      run_dir: folder of the run.
      step: step of the checkpoint; None is the newest.

    Raises:
      ValueError: there is no run.
    """
    record = find_record(run_dir, step)
    if record is None:
        raise ValueError(f"run_dir={run_dir} is not a run: it has no config.json")
    return record


def _restore(
    run_dir: Path, step: int | None, wanted: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[int, Params]:
    folder = (run_dir / "checkpoints").absolute()
    if not folder.exists():
        raise ValueError(f"run_dir={run_dir} has no checkpoint yet")
    # Not by a manager, which may remove what the run is writing.
    steps = [int(path.name) for path in checkpoint_folders(run_dir)]
    step = step if step is not None else max(steps, default=None)
    if step is None or step not in steps:
        raise ValueError(
            f"run_dir={run_dir} has no checkpoint of step {step}; it has {steps}"
        )
    _check_intact(run_dir, folder, step, steps)
    tree = {"params": wanted}
    args = ocp.args.PyTreeRestore(
        tree,
        restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(folder / str(step) / "state", args=args)
    # The readers may raise anything for an old checkpoint without digests.
    except Exception as error:
        if has_digests(folder / str(step)):
            raise
        raise ValueError(
            f"run_dir={run_dir}: the checkpoint of step {step} cannot be read: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error
    return step, restored["params"]


def _check_intact(run_dir: Path, folder: Path, step: int, steps: Sequence[int]) -> None:
    """Raises ValueError if a checkpoint is damaged, naming the intact one before it."""
    wrong = damage(folder / str(step))
    if wrong is None:
        return
    older = (other for other in reversed(steps) if other < step)
    intact = (other for other in older if damage(folder / str(other)) is None)
    before = next(intact, None)
    remedy = (
        "no checkpoint before it is intact"
        if before is None
        else f"give --step {before} for the one before"
    )
    raise ValueError(
        f"run_dir={run_dir}: the checkpoint of step {step} is damaged: {wrong}; "
        f"{remedy}"
    )
