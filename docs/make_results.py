"""Writes the tables and pictures of the documentation from kept results.

    python -m docs.make_results              # rewrite tables, draw pictures
    python -m docs.make_results --tables     # tables only, without matplotlib

A page marks each generated table with `<!--begin NAME-->` and `<!--end NAME-->`; the
text between them is replaced. Figures come from `benchmarks/results/`, the
comparison with other projects from `docs/peers.jsonl`. Pictures need
`pip install '.[plan]'`.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    delta_cycles as of_delta,
    long_context_rows as published,
    tpu_schedule_table,
)
from benchmarks.peer_bytes import table as peer_bytes_table
from benchmarks.plan_bytes import compare
from benchmarks.train_memory import MAXTEXT, SPLITS
from benchmarks.windowed_layers import table as windowed_layers_table
from usp_jax import plan
from usp_jax.units import GIB

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
IMAGES = DOCS / "images"
PAGES = (
    "results",
    "peers",
    "memory",
    "numerics",
    "tpu-cycles",
    "delta",
)
BLOCK = re.compile(r"(<!--begin ([\w-]+)-->\n).*?(<!--end \2-->)", re.DOTALL)
K, MIB = 1024, 2**20
Line = dict[str, Any]


def kept(name: str) -> list[Line]:
    """Lines of the newest results of this name."""
    newest = max(RESULTS.glob(f"*-{name}.jsonl"))
    return [json.loads(line) for line in newest.read_text().splitlines()]


def surveyed() -> list[Line]:
    """Lines of the comparison with other projects."""
    return [
        json.loads(line) for line in (DOCS / "peers.jsonl").read_text().splitlines()
    ]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    first, *others = (f"| {' | '.join(line)} |" for line in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *others])


# Tables.


def _tflops(contender: str, mask: str, length: int, head_size: int) -> list[float]:
    """TFLOP/s of the forward pass, and of forward and backward together."""
    shape = {"mask": mask, "length": length, "head_size": head_size}
    lines = [
        line
        for line in kept("kernels-h100")
        if line.get("contender") == contender and shape.items() <= line.items()
    ]
    by_pass = {line["pass"]: line["tflops"] for line in lines}
    return [by_pass[name] for name in ("forward", "forward_backward") if by_pass]


OURS, CUDNN = "usp_jax mosaic_gpu", "jax.nn cudnn"


def kernels() -> str:
    """TFLOP/s on the H100 with cuDNN's, for the shapes that are not in the picture."""
    shapes = {
        "causal, 64K tokens": ("causal", 64 * K, 128),
        "not causal, 16K": ("full", 16 * K, 128),
        "causal, 16K, heads of 64": ("causal", 16 * K, 64),
        "8 packed documents, 32K": ("packed", 32 * K, 128),
    }
    rows = []
    for name, shape in shapes.items():
        theirs = _tflops(CUDNN, *shape) or [None, None]
        cells = [
            f"{own:.0f}" if other is None else f"{own:.0f} ({other:.0f})"
            for own, other in zip(_tflops(OURS, *shape), theirs, strict=True)
        ]
        rows.append((name, *cells))
    ring = _tflops(f"{OURS}, virtual ring of 8", "causal", 64 * K, 128)
    whole = _tflops(OURS, "causal", 64 * K, 128)
    times = [f"{x / y:.2f}×" for x, y in zip(whole, ring, strict=True)]
    rows.append(("virtual ring of 8, 64K: time", *times))
    return markdown(("TFLOP/s (cuDNN's)", "forward", "forward + backward"), rows)


def training_step() -> str:
    """Seconds and MFU of eight layers on the H100."""
    rows = []
    for line in kept("train-h100"):
        if line.get("implementation") == OURS.split()[1]:
            shares = (line[name] for name in ("mfu_causal", "mfu_full", "hfu"))
            mfu = " / ".join(f"{100 * share:.1f}" for share in shares)
            words = f"{line['tokens'] // K}K", f"`{line['remat']}`"
            rows.append((*words, f"{line['step_seconds']:.2f} s", f"{mfu} %"))
    return markdown(("tokens", "`remat`", "step", "MFU causal / full / hardware"), rows)


def attention_cpu() -> str:
    """Times of attention on the CPU in units of ringattention's."""
    names = {
        "usp_jax ring=2 ulysses=4": "ring 2 × Ulysses 4",
        "usp_jax ring=4 ulysses=2": "ring 4 × Ulysses 2",
        "usp_jax ring=8 ulysses=1": "ring 8",
        "ringattention blocks=256x256": "`ringattention`, best blocks",
        "usp_jax one device": "one device",
        "xla one device": "XLA, one device",
    }
    lines = {
        (line["contender"], line["pass"]): line
        for line in kept("attention-cpu")
        if "contender" in line
    }
    rows = []
    for contender, name in names.items():
        passes = [lines[contender, which] for which in ("forward", "forward_backward")]
        times = (f"{line['ratio_to_ringattention']:.2f}" for line in passes)
        rows.append(
            (name, *times, f"{passes[1]['temporary_bytes_a_device'] / 1e6:.0f} MB")
        )
    head = "time ratio", "forward", "forward + backward"
    return markdown((*head, "memory a device"), rows)


def commands() -> str:
    """What `make train`, passkeys and `make test` came to."""
    lines = {
        line["command"]: line for line in kept("commands-cpu") if "command" in line
    }
    train, tests = lines["make train"], lines["make test"]
    training = lines["python -m train passkey"]
    keys = lines["python -m train.long_context passkey runs/passkey"]
    found = ", ".join(
        f"{share:.0%} at {int(tokens) // K}K" for tokens, share in keys["found"].items()
    )
    loss = f"loss {train['first_loss']} to {train['last_loss']} {train['unit']}"
    loss += f" in {train['steps']} steps"
    rows = [
        (
            "`make train`",
            f"{train['minutes']} min from a clean clone; {loss}",
        ),
        (
            f"`{training['command']}`",
            f"{training['minutes']} min with other work; finds {found}",
        ),
        (
            f"`make test`, Python {tests['python']}",
            f"{tests['minutes']} min from a clean clone, {tests['tests']:,} tests",
        ),
    ]
    return markdown(("command", "result"), rows)


def peers() -> str:
    """Answers by feature and project."""
    first, *lines = surveyed()
    rows = []
    for line in lines:
        if "feature" in line:
            answers = [line["answers"][name]["answer"] for name in first["peers"]]
            answers = ["–" if answer == "not found" else answer for answer in answers]
            rows.append((line["feature"], line["usp_jax"], *answers))
    return markdown(("", "usp_jax", *first["peers"]), rows)


def longest() -> str:
    """Peaks of the longest steps that were compiled, by machine."""
    names = {
        "a100-2912K": "16 A100",
        "h100-1280K": "8 H100",
        "h100-offload-2048K": "8 H100, offloaded",
        "h200-1200K": "1 H200, offloaded",
        "v5p-12288K": "64 v5p",
        "v5p-offload-8192K": "64 v5p, offloaded",
    }
    lines = {line["name"]: line for line in kept("train-memory")}
    rows = []
    for name, machine in names.items():
        line = lines[name]
        assert line["fits"]
        sizes = (line[f"{part}_bytes"] / GIB for part in ("peak", "host"))
        tokens = f"{line['tokens'] // K}K"
        rows.append((machine, tokens, *(f"{size:.1f}" for size in sizes)))
    return markdown(("machine", "tokens", "peak, GiB", "host, GiB"), rows)


def maxtext() -> str:
    """Ranges of peaks and bytes over MaxText's, by remat policy and length."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for line in kept("train-memory"):
        if line["group"] != "maxtext":
            continue
        _, split, remat, _ = line["name"].split("-")
        theirs = MAXTEXT[line["tokens"] // K, split]
        assert SPLITS[split] == (line["mesh"]["ring"], line["mesh"]["ulysses"])
        if theirs is None:
            continue
        length = {64: "64K", 4096: "4M"}.get(line["tokens"] // K, "256K–2M")
        moved = sum(
            line["collectives"][kind]["result_bytes"] / GIB
            for kind in ("collective-permute", "all-to-all")
        )
        own = ratios.setdefault(line["options"].get("remat", remat), {})
        peak = line["peak_bytes"] / GIB / theirs.peak
        own.setdefault(f"peak, {length}", []).append(peak)
        sent = moved / (theirs.permutes + theirs.all_to_alls)
        own.setdefault("permutes + all-to-alls", []).append(sent)
    # The lengths in their order, then what is sent.
    columns = sorted(
        next(iter(ratios.values())), key=lambda x: x.startswith("permutes")
    )
    rows = [
        (f"`{remat}`", *(_range(own[column]) for column in columns))
        for remat, own in ratios.items()
    ]
    return markdown(("`remat`", *columns), rows)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low}–{high}"


def errors() -> str:
    """Relative errors by dtype, of one device and of eight."""
    lines = [line for line in kept("errors-cpu") if "dtype" in line]
    rows = []
    for dtype in dict.fromkeys(line["dtype"] for line in lines):
        own = {
            (line["ring"], line["ulysses"]): line
            for line in lines
            if line["dtype"] == dtype
        }
        pair = own[1, 1], own[8, 1]
        outs = [line["out"] for line in pair]
        grads = [max(line[name] for name in ("dq", "dk", "dv")) for line in pair]
        rows.append((dtype, *(f"{cell:.1e}" for cell in (*outs, *grads))))
    head = "out, one device", "ring 8", "gradients, one device", "ring 8"
    return markdown(("", *head), rows)


def windowed_layers() -> str:
    """A step of a model with windowed layers, and in parentheses with full ones."""
    head = "machine", "tokens", "sent, GiB a device", "peak, GiB", "modelled seconds"
    return markdown(head, windowed_layers_table(kept("windowed-layers")))


def long_context_rows() -> str:
    """Google's long-context rows with the planner's choices."""
    lines = kept("long-context-rows")
    return markdown(published.HEAD, published.table(lines))


def tpu_cycles() -> str:
    """Cycles of the TPU kernels, in the schedules that were compiled."""
    rows = tpu_schedule_table.rows(kept("tpu-schedule-sample"))
    return markdown(tpu_schedule_table.HEAD, rows)


def tpu_heads() -> str:
    """Shares of a TPU's peak by head size."""
    rows = tpu_schedule_table.by_head_size(kept("tpu-schedule-sample"))
    head = (f"heads of {size}" for size in tpu_schedule_table.HEAD_SIZES)
    return markdown(("% of peak, 8K / 32K", *head), rows)


def tpu_masks() -> str:
    """Shares of a TPU's peak by mask."""
    rows = tpu_schedule_table.by_mask(kept("tpu-schedule-sample"))
    return markdown(("% of peak, 8K / 32K", *tpu_schedule_table.MASKS), rows)


def delta_cycles() -> str:
    """Cycles of the delta rule on TPUs, in plain XLA and in the kernel."""
    return markdown(*of_delta.table(kept("delta-tpu")))


TABLES: dict[str, Callable[[], str]] = {
    "long-context-rows": long_context_rows,
    "windowed-layers": windowed_layers,
    "kernels": kernels,
    "training-step": training_step,
    "attention-cpu": attention_cpu,
    "commands": commands,
    "peer-bytes": lambda: peer_bytes_table(kept("peer-bytes")),
    "peers": peers,
    "longest": longest,
    "maxtext": maxtext,
    "errors": errors,
    "tpu-cycles": tpu_cycles,
    "tpu-heads": tpu_heads,
    "tpu-masks": tpu_masks,
    "delta-cycles": delta_cycles,
}


def rewritten(text: str) -> str:
    """A page with every marked table made again.

    Raises:
      KeyError: a mark names no table.
    """
    return BLOCK.sub(lambda m: f"{m[1]}\n{TABLES[m[2]]()}\n\n{m[3]}", text)


# Pictures: the points of each, then its drawing.

Points = dict[str, list[list[Any]]]


def kernel_points() -> Points:
    """TFLOP/s by length: causal, heads of 128."""
    points: Points = {}
    for line in kept("kernels-h100"):
        is_shape = line.get("mask") == "causal" and line["head_size"] == 128
        if is_shape and line["contender"] in (OURS, CUDNN):
            name = f"{line['contender']}, {line['pass'].replace('_', ' + ')}"
            points.setdefault(name, []).append([line["length"], round(line["tflops"])])
    return {name: sorted(row) for name, row in points.items()}


def byte_points() -> Points:
    """MiB a device sends in a layer, forward and backward, by ring degree of 64."""
    names = {
        "unidirectional": "ring, bidirectional, double, all-gather",
        "pass_q": "pass-Q",
        "ulysses_chunks=2": "two head groups",
        "window, zigzag": "window of 4096, zigzag",
        "window, contiguous": "window of 4096, contiguous",
    }
    points: Points = {name: [] for name in names.values()}
    for line in kept("bytes-per-layer"):
        if line.get("devices") == 64 and line["choice"] in names:
            sent = line["forward_mib"] + line["backward_mib"]
            points[names[line["choice"]]].append([line["ring"], sent])
    return {name: sorted(row) for name, row in points.items()}


def memory_points() -> Points:
    """GiB by option: the peak of a device, and what it keeps on its host."""
    lines = [line for line in kept("train-memory") if line["group"] == "options"]
    return {
        part: [
            [
                line["name"].removeprefix("v5p-").removesuffix("-1024K"),
                round(line[f"{part}_bytes"] / GIB, 2),
            ]
            for line in lines
        ]
        for part in ("peak", "host")
    }


def plan_points() -> Points:
    """GiB of peak memory, compiled and predicted."""
    points: Points = {"GPU": [], "TPU": []}
    for line in map(compare, kept("plan-bytes")):
        if "peak_bytes" in line:
            is_tpu = plan.machine(line["machine"]).torus_dims > 0
            sizes = line["peak_bytes"], line["predicted_peak_bytes"]
            points["TPU" if is_tpu else "GPU"].append(
                [round(x / GIB, 2) for x in sizes]
            )
    return points


def cycle_points() -> Points:
    """Shares of the cycles of a full pair of blocks in which the MXU works."""
    return tpu_schedule_table.points(kept("tpu-schedule-sample"))


def draw_kernels(axes: Any, points: Points) -> None:
    for name, row in points.items():
        dashes = "-" if name.startswith(OURS) else "--"
        color = "tab:blue" if name.endswith("forward") else "tab:orange"
        axes.plot(*zip(*row, strict=True), dashes, color=color, marker="o", label=name)
    axes.set_xscale("log", base=2)
    lengths = [length for length, _ in next(iter(points.values()))]
    axes.set_xticks(lengths, [f"{length // K}K" for length in lengths])
    axes.set(xlabel="tokens", ylabel="TFLOP/s", ylim=(0, None))


def draw_bytes(axes: Any, points: Points) -> None:
    for name, row in points.items():
        axes.plot(*zip(*row, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    degrees = [2**n for n in range(7)]
    axes.set_xticks(degrees, [f"R={r}\nU={64 // r}" for r in degrees])
    sizes = [2**n for n in range(6, 17, 2)]
    axes.set_yticks(sizes, [f"{size:,}" for size in sizes])
    axes.set(ylabel="MiB sent by a device")


def draw_memory(axes: Any, points: Points) -> None:
    names = [name for name, _ in points["peak"]]
    peaks, hosts = ([size for _, size in points[part]] for part in ("peak", "host"))
    rows = range(len(names))
    axes.barh([y - 0.2 for y in rows], peaks, 0.4, label="peak of a device")
    axes.barh([y + 0.2 for y in rows], hosts, 0.4, label="kept on the host")
    for bars in axes.containers:
        axes.bar_label(bars, fmt=lambda x: f"{x:.1f}" if x else "", padding=3)
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="GiB a device")


def draw_cycles(axes: Any, points: Points) -> None:
    names = [name for name, _ in points["usp_jax"]]
    for index, (kernel, row) in enumerate(points.items()):
        places = [names.index(name) + 0.27 * (index - 1) for name, _ in row]
        shares = [share for _, share in row]
        bars = axes.bar(places, shares, 0.27, label=kernel)
        axes.bar_label(bars, fmt="%.0f", fontsize="x-small")
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.set(ylabel="% of cycles that the MXU works", ylim=(0, 125))


def draw_plan(axes: Any, points: Points) -> None:
    sizes = [2**n for n in range(2, 7)]
    ends = [sizes[0], sizes[-1]]
    axes.fill_between(
        ends,
        [0.9 * x for x in ends],
        [1.1 * x for x in ends],
        color="0.9",
        label="within 10 %",
    )
    for name, row in points.items():
        axes.plot(*zip(*row, strict=True), "o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sizes, sizes)
    axes.set_yticks(sizes, sizes)
    axes.set(xlabel="compiled peak, GiB", ylabel="predicted peak, GiB")


PICTURES: dict[str, tuple[Callable[[], Points], Callable[[Any, Points], None]]] = {
    "kernels-h100": (kernel_points, draw_kernels),
    "bytes-per-layer": (byte_points, draw_bytes),
    "memory-options": (memory_points, draw_memory),
    "planned-bytes": (plan_points, draw_plan),
    "tpu-cycles": (cycle_points, draw_cycles),
}


def digest(points: Points) -> str:
    """A short hash of the points, kept in the picture that shows them."""
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()[:16]


def draw(name: str) -> None:
    """Draw one picture into `docs/images/`."""
    import matplotlib
    from matplotlib.figure import Figure

    make_points, draw_points = PICTURES[name]
    points = make_points()
    # So that the same points give the same file.
    matplotlib.rcParams["svg.hashsalt"] = name
    figure = Figure((6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    draw_points(axes, points)
    axes.legend(fontsize="small")
    metadata = {"Date": None, "Description": digest(points)}
    figure.savefig(IMAGES / f"{name}.svg", metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="draw no pictures")
    options = parser.parse_args()
    for name in PAGES:
        page = DOCS / f"{name}.md"
        page.write_text(rewritten(page.read_text()))
    for name in () if options.tables else PICTURES:
        draw(name)


if __name__ == "__main__":
    main()
