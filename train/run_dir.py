"""The record of a run, and the check that a run directory belongs to the same run.

The record is in config.json, and each checkpoint carries the one that it was made with.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import jax

from train.config import Config, ModelConfig, flatten
from train.digests import RECORD, read_intact
from train.model_record import model_record
from usp_jax.models.execution import Computation

# The run's copy of its tokenizer; runs of older versions have none.
TOKENIZER = "tokenizer.json"

# Options that may change when a run is resumed: where and how fast it is computed, what
# is logged, and the number of steps (which the learning rate then follows). Everything
# else identifies the run.
FREE_ON_RESUME = (
    "accumulate",
    "checkpoint",
    "distributed",
    "eval",
    "fake_devices",
    "layout",
    "log",
    "mesh",
    *(
        f"model.{field.name}"
        for field in dataclasses.fields(Computation)
        if field.name != "param_dtype"
    ),
    "optimizer.offload",
    "optimizer.max_skipped",
    "profile",
    "run_dir",
    "sample",
    "steps",
    # Facts, not options.
    "environment",
    # Location of the text. Its content is compared by data.documents, .tokens, .sha256,
    # .weights and .tokenizer_fingerprint.
    "data.chat_template",
    "data.form",
    "data.mixture",
    "data.path",
    "data.text_field",
    "data.tokenizer",
)

# Facts that older versions did not record, and which then cannot be compared.
NEWER_FACTS = ("data.tokenizer_fingerprint",)


class DataRecord(TypedDict):
    """The section `data` of config.json; runs of older versions have no mixture."""

    path: str | None
    tokenizer: str | None
    mixture: NotRequired[list[tuple[str, float]]]
    tokenizer_fingerprint: NotRequired[str]


class RunRecord(TypedDict):
    """The contents of config.json that are read back.

    Attributes:
      model: the fields of a `LlamaConfig` except its dtype.
      mesh: the size of each axis, and other options of the mesh.
      lora: the options of adapters; runs of older versions have none.
    """

    model: dict[str, Any]
    mesh: dict[str, Any]
    data: DataRecord
    lora: NotRequired[dict[str, Any]]
    dtype: str
    sequence_length: int
    fake_devices: int | None
    init_from: NotRequired[str | None]


def record(config: Config, **facts: Mapping[str, object]) -> dict[str, object]:
    """The contents of config.json: the config, with facts added to its sections."""
    tree = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    tree["model"] = model_record(config.model)
    for section, values in facts.items():
        tree[section] = {**tree.get(section, {}), **values}
    return tree


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The folders of a run's finished checkpoints, damaged or not, by step."""
    folders = (run_dir / "checkpoints").glob("*")
    steps = (folder for folder in folders if folder.name.isdigit())
    return sorted(steps, key=lambda folder: int(folder.name))


def check_same_run(run_dir: Path, wanted: dict[str, object]) -> None:
    """Raises ValueError if config.json or a checkpoint is of another run.

    A checkpoint with a damaged record is not compared: its digests refuse it.
    """
    path, records = run_dir / RECORD, {}
    if path.exists():
        records[path] = read_record(path)
    folders = checkpoint_folders(run_dir)
    for folder in folders:
        carried = carried_record(folder)
        if carried is not None:
            records[folder / RECORD] = carried
    if folders and not records and jax.process_index() == 0:
        print(
            f"warning: {path} is missing, and no checkpoint carries a copy: it is not "
            "known whether the options are those of the run",
            file=sys.stderr,
        )
    for path, old in records.items():
        if differing := _differences(old, wanted):
            lines = [f"run_dir={run_dir} holds another run, see {path}:", *differing]
            raise ValueError(
                "\n".join(lines)
                + "\ngive its values to resume it, or another --run-dir to start over"
            )


def _differences(old_record: RunRecord, wanted: dict[str, object]) -> list[str]:
    """Describes each difference between two records that makes them other runs."""
    old, new = flatten(old_record), flatten(wanted)
    # Options that did not exist yet had the effect of their defaults.
    old = _defaults() | {name: new.get(name) for name in NEWER_FACTS} | old
    return [
        f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_free(name)
    ]


def carried_record(checkpoint: Path) -> RunRecord | None:
    """The record that a checkpoint carries; None if there is none or it is damaged."""
    content = read_intact(checkpoint, RECORD)
    return None if content is None else json.loads(content)


def find_record(run_dir: Path, step: int | None = None) -> RunRecord | None:
    """The record of a run at a checkpoint.

    Args:
      run_dir: folder of the run.
      step: step of the checkpoint; None is the newest.

    Returns:
      The checkpoint's own record, else config.json, else None.

    Raises:
      ValueError: config.json is damaged.
    """
    folders = checkpoint_folders(run_dir)
    if step is not None:
        folders = [folder for folder in folders if int(folder.name) == step]
    carried = carried_record(folders[-1]) if folders else None
    path = run_dir / RECORD
    if carried is None and path.exists():
        return read_record(path)
    return carried


def read_record(path: Path) -> RunRecord:
    """Reads config.json; raises ValueError if it is damaged."""
    try:
        content = json.loads(path.read_text())
        for name in ("model", "mesh", "data"):
            if not isinstance(content, dict) or not isinstance(content.get(name), dict):
                raise ValueError(f"it has no section {name!r}")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: {error}; remove it if the checkpoints next to it "
            "belong to this run, or give another --run-dir"
        ) from error


def _defaults() -> dict[str, object]:
    """Defaults of all options that have one, by dotted name."""
    plain = _fields_with_defaults(Config)
    plain["model"] = _fields_with_defaults(ModelConfig)
    return flatten(json.loads(json.dumps(plain, default=_plain)))


def _plain(value: object) -> object:
    """Converts values for JSON: a section to a dict, a path to a string."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)


def _fields_with_defaults(kind: type[Config | ModelConfig]) -> dict[str, object]:
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }


def _is_free(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)
