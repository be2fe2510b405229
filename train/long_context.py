"""`python -m train.long_context by-position|passkey RUN_DIR`: evaluates long contexts.

Evaluates the model of a run's checkpoint, on the mesh of the run. A damaged checkpoint
is refused. The printed tables are also written to the run directory, as
by_position.json and passkey.json.
"""

import dataclasses
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import tyro

from train.config import DataConfig, MeshConfig
from train.data.text import load_text
from train.data.token_folder import DataGone
from train.data.vocabulary import Vocabulary
from train.evaluation.by_position import doubling, in_buckets, nats_by_position, windows
from train.evaluation.retrieval import accuracies, greedy
from train.fake_devices import make_fake_devices
from train.files import write_atomically
from train.mesh import make_mesh
from train.run_dir import RunRecord
from train.trained import load_model, read_run
from train.words import check_no_empty_value
from usp_jax.mesh import ROLES
from usp_jax.models.llama import Llama


@dataclasses.dataclass(frozen=True)
class ByPosition:
    """Perplexity by position in windows of text.

    Attributes:
      run_dir: folder of a run of `python -m train`.
      text: a file or folder; None is the run's training text.
      length: length of the windows in tokens; None is the run's sequence length.
      rows: maximum number of windows to evaluate.
      buckets: number of buckets; each ends at twice the position of the previous one.
      batch_size: number of windows to evaluate at once.
      step: step of the checkpoint; None is the newest.
    """

    run_dir: tyro.conf.Positional[Path]
    text: Path | None = None
    length: int | None = None
    rows: int = 64
    buckets: int = 8
    batch_size: int = 1
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Accuracy of finding five digits in filler, by length and depth.

    Attributes:
      run_dir: folder of a run of `python -m train`.
      lengths: lengths of the texts in tokens; by default 1/8, 1/4, 1/2 and all of the
        run's sequence length.
      depths: positions of the key, from 0 (start of the text) to 1 (end).
      examples: number of texts for each length and depth.
      seed: seed of the texts; a run with another seed has not seen them.
      step: step of the checkpoint; None is the newest.
    """

    run_dir: tyro.conf.Positional[Path]
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    examples: int = 10
    seed: int = 1_000_000
    step: int | None = None


def main() -> None:
    """Runs an evaluation; exits with 2 for errors that the user can fix."""
    try:
        check_no_empty_value(sys.argv[1:])
        options = tyro.cli(ByPosition | Passkey, prog="python -m train.long_context")
        run = read_run(options.run_dir, options.step)
        if run["fake_devices"] is not None:
            make_fake_devices(run["fake_devices"])
        measure(options)
    except (ValueError, DataGone) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def measure(options: ByPosition | Passkey) -> dict[str, object]:
    """Runs an evaluation, prints and writes its results, and returns them.

    Raises:
      ValueError: there is no such run, checkpoint or text, the checkpoint is damaged,
        or the options do not fit it.
    """
    _check(options)
    run = read_run(options.run_dir, options.step)
    sizes: dict[str, Any] = {name: run["mesh"][name] for name in ROLES}
    mesh = make_mesh(MeshConfig(**sizes))
    step, model = load_model(options.run_dir, options.step, mesh)
    if isinstance(options, ByPosition):
        name, (table, values) = "by_position", by_position(options, run, model)
    else:
        name, (table, values) = "passkey", passkey(options, run, model)
    results = {"step": step, **values}
    write_atomically(options.run_dir / f"{name}.json", json.dumps(results) + "\n")
    rich.console.Console().print(table)
    return results


def _check(options: ByPosition | Passkey) -> None:
    """Raises ValueError, naming the option, for values that no run has."""
    if isinstance(options, ByPosition):
        names = ("length", "rows", "buckets", "batch_size")
        counts = [(name, getattr(options, name)) for name in names]
    else:
        counts = [("lengths", length) for length in options.lengths]
        counts.append(("examples", options.examples))
        if options.seed < 0:
            raise ValueError(f"seed={options.seed} must not be negative")
        for depth in options.depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depths: {depth} must be between 0 and 1")
    for name, value in counts:
        if value is not None and not 0 < value < 2**31:
            raise ValueError(f"{name}={value} must be positive, and less than 2**31")


def by_position(
    options: ByPosition, run: RunRecord, model: Llama
) -> tuple[rich.table.Table, dict[str, object]]:
    """Measures perplexity by position; returns a table and its values."""
    length = options.length or run["sequence_length"]
    bounds = doubling(length, options.buckets)
    data = run["data"]
    vocabulary = Vocabulary.load(_path(data["tokenizer"]))
    text = options.text or _path(data["path"])
    if text is None and data.get("mixture"):
        raise ValueError(
            f"run_dir={options.run_dir} was trained on a mixture: give --text"
        )
    (corpus,) = load_text(DataConfig(text), vocabulary).corpora
    rows = islice(windows(corpus.documents(), length), options.rows)
    nats = nats_by_position(model, rows, length, options.batch_size)
    buckets = in_buckets(nats, bounds)
    table = rich.table.Table("positions", "nats", "perplexity", title="by position")
    for bucket in buckets:
        table.add_row(
            f"{bucket.first} to {bucket.end - 1}",
            f"{bucket.nats:.4f}",
            f"{bucket.perplexity:.2f}",
        )
    return table, {"buckets": [dataclasses.asdict(bucket) for bucket in buckets]}


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def passkey(
    options: Passkey, run: RunRecord, model: Llama
) -> tuple[rich.table.Table, dict[str, object]]:
    """Measures passkey retrieval; returns a table and its values."""
    longest = run["sequence_length"]
    results = accuracies(
        greedy(model),
        lengths=options.lengths or [longest // part for part in (8, 4, 2, 1)],
        depths=options.depths,
        examples=options.examples,
        seed=options.seed,
    )
    heads = [f"depth {depth:g}" for depth in options.depths]
    table = rich.table.Table("tokens", *heads, title="passkeys found")
    for length, row in results.items():
        table.add_row(str(length), *(f"{right:.0%}" for right in row.values()))
    rows = [
        {"length": length, "depth": depth, "accuracy": right}
        for length, row in results.items()
        for depth, right in row.items()
    ]
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    return table, {"examples": options.examples, "accuracy": mean, "rows": rows}


if __name__ == "__main__":
    main()
