"""The run directory: config.json, and the check that it belongs to the same run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from train.config import Config, ModelConfig, flatten
from usp_jax.models.execution import Computation

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


class RunRecord(TypedDict):
    """The contents of config.json that are read back.

    Attributes:
      model: the fields of a `LlamaConfig` except its dtype.
      mesh: the size of each axis, and other options of the mesh.
    """

    model: dict[str, Any]
    mesh: dict[str, int]
    data: DataRecord
    dtype: str
    sequence_length: int
    fake_devices: int | None
    init_from: NotRequired[str | None]


def record(config: Config, **facts: Mapping[str, object]) -> dict[str, object]:
    """The contents of config.json: the config, with facts added to its sections."""
    tree = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    scaling = config.model.rope_scaling
    if scaling is not None:
        # Different kinds of scaling may have the same fields.
        tree["model"]["rope_scaling"]["type"] = type(scaling).__name__
    for section, values in facts.items():
        tree[section] = {**tree.get(section, {}), **values}
    return tree


def check_same_run(path: Path, wanted: dict[str, object]) -> None:
    """Raises ValueError if config.json describes another run."""
    if not path.exists():
        return
    old, new = flatten(read_record(path)), flatten(wanted)
    # Options that did not exist yet had the effect of their defaults.
    old = _defaults() | {name: new.get(name) for name in NEWER_FACTS} | old
    differing = [
        f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_free(name)
    ]
    if differing:
        raise ValueError(
            "\n".join([f"run_dir={path.parent} holds another run:", *differing])
            + "\ngive its values to resume it, or another --run-dir to start over"
        )


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
