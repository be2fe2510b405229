"""The run directory: config.json, and whether what lies there is the same run."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from train.config import Config, flatten

# What may differ when a run goes on: where and how fast it is computed, what is told of
# it, and how far it goes (the learning rate then follows the new number of steps). All
# else is what the run is.
FREE_ON_RESUME = (
    "accumulate",
    "checkpoint",
    "distributed",
    "fake_devices",
    "layout",
    "log",
    "mesh",
    "model.implementation",
    "model.loss_chunk",
    "model.remat",
    "optimizer.max_skipped",
    "profile",
    "run_dir",
    "sample",
    "steps",
    # Facts, not choices.
    "environment",
    # Where the text lies; what it is, is compared as data.documents, .tokens, .sha256.
    "data.path",
    "data.tokenizer",
)


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
    old, new = flatten(json.loads(path.read_text())), flatten(wanted)
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


def _is_free(name):
    return any(name == free or name.startswith(f"{free}.") for free in FREE_ON_RESUME)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that whoever reads it sees the old or the new, never half."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
