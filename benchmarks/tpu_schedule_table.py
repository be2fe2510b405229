"""The tables and the points of the picture made from `tpu_schedule`'s lines."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

Line = dict[str, Any]
GENERATIONS = ("v5e", "v5p", "v6e", "tpu7x")
HEAD = (
    "",
    "least",
    "full / partial",
    "step / run",
    "% of peak, 8K / 32K",
    "jax's: full, 32K",
    "tokamax's: full, 32K",
)
HEAD_SIZES = ("64", "128", "192/128", "256")
MASKS = ("causal", "full", "window", "packed")


def rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """Yields a row for each kernel of usp_jax, with the other projects' in its row.

    Calls are causal with heads of 128.
    """
    found = {
        (_place(line), line["kernel"]): line
        for line in _counted(lines)
        if (line["mask"], _heads(line)) == ("causal", "128")
    }
    for (place, kernel), line in found.items():
        if kernel != "usp_jax":
            continue
        blocks = line["block_q"], line["block_kv"]
        size = "" if blocks == (1024, 1024) else ", {} × {}".format(*blocks)
        yield (
            " ".join(place) + size,
            _scaled(line, "mxu"),
            " / ".join(_scaled(line, kind) for kind in ("full", "partial")),
            f"{line['step_cycles']} / {line['run_cycles']}",
            _percents(line),
            *(_other(found.get((place, name))) for name in ("jax", "tokamax")),
        )


def by_head_size(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """Yields the % of the peak of causal calls by head size, at 8K / 32K tokens."""
    chosen = [line for line in _counted(lines) if line["mask"] == "causal"]
    yield from _pivoted(chosen, _heads, HEAD_SIZES)


def by_mask(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """Yields the % of the peak by mask, for heads of 128 where several were counted."""
    chosen = [line for line in _counted(lines) if _heads(line) == "128"]
    several = {_place(line) for line in chosen if line["mask"] != "causal"}
    chosen = [line for line in chosen if _place(line) in several]
    yield from _pivoted(chosen, lambda line: str(line["mask"]), MASKS)


def points(lines: Sequence[Line]) -> dict[str, list[list[Any]]]:
    """Returns the % of cycles in which the MXUs work, for full blocks, by kernel.

    Calls are causal with heads of 128.
    """
    found: dict[str, list[list[Any]]] = {}
    for line in _counted(lines):
        if (line["mask"], _heads(line)) == ("causal", "128"):
            share = round(100 * line["mxu_cycles"] / line["full_cycles"], 1)
            found.setdefault(line["kernel"], []).append([" ".join(_place(line)), share])
    return found


def _counted(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines that did not fail, in the order of the tables."""
    return sorted((line for line in lines if "full_cycles" in line), key=_order)


def _order(line: Line) -> tuple[Any, ...]:
    return (
        line["pass"] == "backward",
        GENERATIONS.index(line["generation"]),
        ("usp_jax", "jax", "tokamax").index(line["kernel"]),
    )


def _place(line: Line) -> tuple[str, str]:
    return line["pass"], line["generation"]


def _heads(line: Line) -> str:
    of_q, of_v = line["head_size"], line["v_head_size"]
    return f"{of_q}" if of_q == of_v else f"{of_q}/{of_v}"


def _pivoted(
    lines: Sequence[Line], column: Callable[[Line], str], columns: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """Yields a row for each pass and generation of usp_jax, with a cell by column."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for line in lines:
        if line["kernel"] == "usp_jax":
            cells.setdefault(_place(line), {})[column(line)] = _percents(line)
    for place, found in cells.items():
        yield (" ".join(place), *(found.get(name, "–") for name in columns))


def _scaled(line: Line, kind: str) -> str:
    """Returns a block's cycles for each 1024 × 1024 pairs."""
    blocks = line["block_q"] * line["block_kv"] / 1024**2
    return f"{line[f'{kind}_cycles'] / blocks:.0f}"


def _percents(line: Line) -> str:
    return " / ".join(f"{100 * call['share_of_peak']:.0f}" for call in line["calls"])


def _other(line: Line | None) -> str:
    """Returns the cycles of another project's kernel, or a dash."""
    if line is None:
        return "–"
    share = line["calls"][-1]["share_of_peak"]
    return f"{_scaled(line, 'full')}, {100 * share:.0f} %"
