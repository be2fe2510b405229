"""The run directory: config.json, and whether what lies there is the same run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from train.config import Config, ModelConfig, flatten
from usp_jax.models.execution import Computation

# What may differ when a run goes on: where and how fast it is computed, what is told of
# it, and how far it goes (the learning rate then follows the new number of steps). All
# else is what the run is.
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
    # Facts, not choices.
    "environment",
    # Where the text lies; what it is, is compared as data.documents, .tokens, .sha256,
    # .weights and .tokenizer_fingerprint.
    "data.mixture",
    "data.path",
    "data.text_field",
    "data.tokenizer",
)

# What older versions did not tell, which then cannot be compared.
NEWER_FACTS = ("data.tokenizer_fingerprint",)


def record(config: Config, **facts: dict[str, Any]) -> dict[str, Any]:
    """What config.json says: the config, with facts added to its sections."""
    tree = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    scaling = config.model.rope_scaling
    if scaling is not None:
        # Two kinds may have the same fields.
        tree["model"]["rope_scaling"]["type"] = type(scaling).__name__
    for section, values in facts.items():
        tree[section] = tree.get(section, {}) | values
    return tree


def check_same_run(path: Path, wanted: dict[str, Any]) -> None:
    """Raises ValueError when the run that config.json tells of is not this one."""
    if not path.exists():
        return
    old, new = flatten(read_record(path)), flatten(wanted)
    # An option that was not there yet had its default's effect.
    old = _defaults() | {name: new.get(name) for name in NEWER_FACTS} | old
    differing = [
        f"  {name}: {old.get(name)!r} there, {new.get(name)!r} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _is_free(name)
    ]
    if differing:
        raise ValueError(
            "\n".join([f"run_dir={path.parent} holds another run:", *differing])
            + "\ngive these values to go on with it, or another --run-dir to begin anew"
        )


def read_record(path: Path) -> dict[str, Any]:
    """What config.json says; raises ValueError when it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}; take it away if its checkpoints are of the "
            "run that you ask for, or give another --run-dir"
        ) from error


def _defaults():
    """What an option is that nobody gives, where it has a default."""
    sections = _fields_with_defaults(Config)
    plain = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for name, value in sections.items()
    }
    plain["model"] = _fields_with_defaults(ModelConfig)
    return flatten(json.loads(json.dumps(plain, default=str)))


def _fields_with_defaults(kind):
    return {
        field.name: field.default
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    }


def _is_free(name):
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)
