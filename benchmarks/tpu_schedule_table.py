"""The table and the points of the picture made from `tpu_schedule`'s lines."""

from collections.abc import Iterator, Sequence
from typing import Any

Line = dict[str, Any]
HEAD = (
    "",
    "least",
    "full / partial",
    "step / run",
    "% of peak, 8K / 32K",
    "jax's: full, 32K",
    "tokamax's: full, 32K",
)
# The fields that kernels of one row have in common.
SAME = ("generation", "pass", "mask", "head_size", "v_head_size")


def rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    """Yields a row for each kernel of usp_jax, with the same call's of the others."""
    counted = [line for line in lines if "full_cycles" in line]
    for line in sorted(counted, key=_order):
        if line["kernel"] != "usp_jax":
            continue
        yield (
            _name(line),
            _scaled(line, "mxu"),
            " / ".join(_scaled(line, kind) for kind in _kinds(line)),
            f"{line['step_cycles']} / {line['run_cycles']}",
            " / ".join(_percent(call) for call in line["calls"]),
            *(_other(line, counted, kernel) for kernel in ("jax", "tokamax")),
        )


def points(lines: Sequence[Line]) -> dict[str, list[list[Any]]]:
    """Returns the % of cycles in which the MXUs work, for full blocks, by kernel.

    Calls are causal with heads of 128.
    """
    found: dict[str, list[list[Any]]] = {}
    for line in sorted((x for x in lines if "full_cycles" in x), key=_order):
        if line["mask"] == "causal" and line["head_size"] == 128:
            share = round(100 * line["mxu_cycles"] / line["full_cycles"], 1)
            name = f"{line['pass']} {line['generation']}"
            found.setdefault(line["kernel"], []).append([name, share])
    return found


def _order(line: Line) -> tuple[Any, ...]:
    """Sorts the usual call first: causal, with heads of 128."""
    usual = line["mask"] == "causal", line["head_size"] == 128
    generations = ("v5e", "v5p", "v6e", "tpu7x")
    return (
        line["pass"] == "backward",
        usual != (True, True),
        line["mask"],
        line["head_size"],
        generations.index(line["generation"]),
        ("usp_jax", "jax", "tokamax").index(line["kernel"]),
    )


def _name(line: Line) -> str:
    of_q, of_v = line["head_size"], line["v_head_size"]
    size = f"{of_q}" if of_q == of_v else f"{of_q}/{of_v}"
    words = [f"{line['pass']} {line['generation']}"]
    words += [] if size == "128" else [f"heads of {size}"]
    words += [] if line["mask"] == "causal" else [line["mask"]]
    blocks = line["block_q"], line["block_kv"]
    words += [] if blocks == (1024, 1024) else ["{} × {}".format(*blocks)]
    return ", ".join(words)


def _kinds(line: Line) -> tuple[str, ...]:
    """The kinds of blocks that a mask has."""
    return ("full",) if line["mask"] == "full" else ("full", "partial")


def _scaled(line: Line, kind: str) -> str:
    """Returns a block's cycles for each 1024 × 1024 pairs."""
    blocks = line["block_q"] * line["block_kv"] / 1024**2
    return f"{line[f'{kind}_cycles'] / blocks:.0f}"


def _percent(call: Line) -> str:
    return f"{100 * call['share_of_peak']:.0f}"


def _other(line: Line, lines: Sequence[Line], kernel: str) -> str:
    """Returns the cycles of another kernel in the same call, or a dash."""
    for other in lines:
        if other["kernel"] == kernel and all(other[x] == line[x] for x in SAME):
            return f"{_scaled(other, 'full')}, {_percent(other['calls'][-1])} %"
    return "–"
