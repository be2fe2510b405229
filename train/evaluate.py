"""`python -m train.evaluate RUN_OR_FOLDER`: perplexity of texts, and passkeys found.

The model is that of a run's checkpoint or of a folder in the Hugging Face format, on
any mesh. A damaged checkpoint is refused. The results for a run are also written to its
folder, as evaluation.json.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
import rich.console
import rich.table
import tyro

from train.config import DataConfig, MeshConfig
from train.data.conversations import TEXT
from train.data.corpus import Corpus
from train.data.text import load_text
from train.data.token_folder import DataGone
from train.evaluation.by_position import (
    doubling,
    in_buckets,
    nats_of_labels,
    no_windows,
    pieces,
)
from train.evaluation.retrieval import accuracies, greedy
from train.files import write_atomically
from train.source import Source
from train.words import check_no_empty_value
from usp_jax.command_line import alive, readers_may_leave
from usp_jax.models.llama import Llama

# Length of a Hugging Face folder's windows, if it is not given and the model allows it.
LONGEST = 8192
# Values of JSON.
Results = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Finding five digits in filler, by length of the text and depth of the key.

    Attributes:
      enabled: measure this, instead of perplexity.
      lengths: lengths of the texts in tokens; by default an eighth, a quarter, half
        and all of --length.
      depths: positions of the key, from 0 (start of the text) to 1 (end).
      examples: number of texts for each length and depth.
      seed: seed of the texts; a run with another seed has not seen them.
    """

    enabled: bool = False
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    examples: int = 10
    seed: int = 1_000_000


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Perplexity of texts, whole and by position, or passkeys found.

    Attributes:
      source: folder of a run of `python -m train`, or of a model in the Hugging Face
        format.
      text: files or folders of text; none is the run's training text.
      length: tokens that the model sees at most; None is the run's sequence length, or
        that of config.json, but at most 8192.
      rows: maximum number of windows to evaluate of each text.
      buckets: maximum number of buckets of positions; each ends at twice the position
        of the previous one.
      batch_size: number of windows to evaluate at once.
      step: step of the run's checkpoint; None is the newest.
      dtype: dtype of the computation, float32 or bfloat16; None is that of the run or
        of config.json.
      json: print one JSON object instead of tables.
      passkey: finding five digits in filler, instead of perplexity.
      mesh: devices along each mesh axis; all 1 is the mesh of the run, or a ring of all
        devices.
      fake_devices: use this many fake CPU devices; None is as in the run, and 0 is
        real devices.
    """

    source: tyro.conf.Positional[Path]
    text: tuple[Path, ...] = ()
    length: int | None = None
    rows: int = 64
    buckets: int = 8
    batch_size: int = 1
    step: int | None = None
    dtype: str | None = None
    json: bool = False
    passkey: Passkey = Passkey()
    mesh: MeshConfig = MeshConfig()
    fake_devices: int | None = None


def evaluate(options: Evaluate) -> Results:
    """Runs an evaluation, prints and writes its results, and returns them.

    Raises:
      ValueError: there is no such model or text, a checkpoint is damaged, or the
        options do not fit.
    """
    _check(options)
    source = Source.open(options.source, options.step, options.dtype)
    texts = {} if options.passkey.enabled else _texts(options, source)
    with alive("loading the model", on_stderr=True):
        step, model = source.load(options.mesh, options.fake_devices)
    results: Results = {} if step is None else {"step": step}
    with alive("evaluating", on_stderr=True):
        if options.passkey.enabled:
            results["passkeys"] = _passkeys(options, source, model)
        else:
            results |= _perplexity(options, source, model, texts)
    if source.run is not None:
        text = json.dumps(results) + "\n"
        write_atomically(options.source / "evaluation.json", text)
    if options.json:
        print(json.dumps(results))
    else:
        _show(results)
    return results


def _check(options: Evaluate) -> None:
    """Raises ValueError, naming the option, for values that no model has."""
    passkey = options.passkey
    names = ("length", "rows", "buckets", "batch_size")
    counts = [(name, getattr(options, name)) for name in names]
    counts += [("passkey.lengths", length) for length in passkey.lengths]
    counts.append(("passkey.examples", passkey.examples))
    for name, value in counts:
        if value is not None and not 0 < value < 2**31:
            raise ValueError(f"{name}={value} must be positive, and less than 2**31")
    if passkey.seed < 0:
        raise ValueError(f"passkey.seed={passkey.seed} must not be negative")
    for depth in passkey.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"passkey.depths: {depth} must be between 0 and 1")


def _texts(options: Evaluate, source: Source) -> dict[str, Corpus]:
    """The texts to evaluate by name."""
    paths: Sequence[Path | None] = options.text
    if not paths:
        if source.run is None:
            raise ValueError(
                f"text=() of {options.source}, which is not a run: give --text FILE, "
                "or --passkey.enabled"
            )
        data = source.run["data"]
        if data.get("mixture"):
            raise ValueError(
                f"source={options.source} was trained on a mixture: give --text"
            )
        paths = (None if data["path"] is None else Path(data["path"]),)
    vocabulary, texts = source.vocabulary(), {}
    for path in paths:
        name = "Python's standard library" if path is None else str(path)
        (texts[name],) = load_text(DataConfig(path, form=TEXT), vocabulary).corpora
    return texts


def _length(options: Evaluate, source: Source) -> int:
    """The tokens that the model sees at most."""
    longest = source.length if source.run is not None else min(source.length, LONGEST)
    return options.length or longest


def _perplexity(
    options: Evaluate, source: Source, model: Llama, texts: Mapping[str, Corpus]
) -> Results:
    """Nats per label of each text, and of all of them by position."""
    length = _length(options, source)
    bounds = doubling(length, min(options.buckets, length.bit_length()))
    files, whole = [], []
    for name, corpus in texts.items():
        rows = islice(pieces(corpus.documents(), length), options.rows)
        nats = list(nats_of_labels(model, rows, length, options.batch_size))
        whole += [x for x in nats if x.size == length]
        every = np.concatenate(nats)
        mean = float(every.mean())
        row = {"labels": every.size, "nats": mean, "perplexity": math.exp(mean)}
        files.append({"text": name, **row})
    results: Results = {"length": length, "texts": files}
    # Without a whole window, no two positions are measured on the same texts.
    if whole:
        buckets = in_buckets(np.mean(whole, 0), bounds)
        results["windows"] = len(whole)
        results["buckets"] = [dataclasses.asdict(bucket) for bucket in buckets]
    elif options.length is not None:
        raise no_windows(length)
    return results


def _passkeys(options: Evaluate, source: Source, model: Llama) -> Results:
    """The share of passkeys found, by length and depth."""
    longest, passkey = _length(options, source), options.passkey
    found = accuracies(
        greedy(model),
        lengths=passkey.lengths or [longest // part for part in (8, 4, 2, 1)],
        depths=passkey.depths,
        examples=passkey.examples,
        seed=passkey.seed,
        vocabulary=source.vocabulary(),
    )
    rows = [
        {"length": length, "depth": depth, "accuracy": right}
        for length, row in found.items()
        for depth, right in row.items()
    ]
    mean = sum(row["accuracy"] for row in rows) / len(rows)
    return {"examples": passkey.examples, "accuracy": mean, "rows": rows}


def _show(results: Results) -> None:
    console = rich.console.Console(highlight=False)
    for table in _tables(results):
        console.print(table)


def _tables(results: Results) -> list[rich.table.Table]:
    """The results as tables."""
    tables = []
    if "texts" in results:
        table = _table("perplexity", "text", "labels", "nats per label", "perplexity")
        for row in results["texts"]:
            numbers = f"{row['nats']:.4f}", f"{row['perplexity']:,.2f}"
            table.add_row(row["text"], f"{row['labels']:,}", *numbers)
        tables.append(table)
    if "buckets" in results:
        title = f"by position, in {results['windows']} whole windows"
        table = _table(title, "positions", "nats per label", "perplexity")
        for row in results["buckets"]:
            positions = f"{row['first']:,} to {row['end'] - 1:,}"
            perplexity = math.exp(row["nats"])
            table.add_row(positions, f"{row['nats']:.4f}", f"{perplexity:,.2f}")
        tables.append(table)
    if "passkeys" in results:
        found = results["passkeys"]
        depths = list(dict.fromkeys(row["depth"] for row in found["rows"]))
        title = f"passkeys found, of {found['examples']}"
        table = _table(title, "tokens", *(f"depth {depth:g}" for depth in depths))
        for length in dict.fromkeys(row["length"] for row in found["rows"]):
            right = (x["accuracy"] for x in found["rows"] if x["length"] == length)
            table.add_row(f"{length:,}", *(f"{share:.0%}" for share in right))
        tables.append(table)
    return tables


def _table(title: str, first: str, *names: str) -> rich.table.Table:
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left"
    )
    table.add_column(first)
    for name in names:
        table.add_column(name, justify="right")
    return table


def main() -> None:
    """Runs an evaluation; exits with 2 for errors that the user can fix."""
    try:
        check_no_empty_value(sys.argv[1:])
        options = tyro.cli(Evaluate, prog="python -m train.evaluate")
        with readers_may_leave():
            evaluate(options)
    except (ValueError, ImportError, DataGone, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, OSError) else 2)


if __name__ == "__main__":
    main()
