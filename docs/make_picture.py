"""Draws docs/images/grid.png: which tokens and heads a device holds, and what it sends.

python docs/make_picture.py
"""

import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from usp_jax.layout import shard_positions

RING, ULYSSES, HEADS = 4, 2, 4
CHUNKS = 2 * RING
COLORS = plt.get_cmap("tab20")


def chunks_of(ring_index: int) -> list[int]:
    """The chunks that the devices of a ring index hold together."""
    return shard_positions("zigzag", ring_index, RING, CHUNKS // RING).tolist()


def color(chunk: int) -> tuple[float, ...]:
    """One hue for each ring index; its later chunk is lighter."""
    hue = next(index for index in range(RING) if chunk in chunks_of(index))
    return COLORS(2 * hue + chunks_of(hue).index(chunk))


def draw_sequence(axes: Axes) -> None:
    axes.text(0, 7.55, "One sequence of T tokens, in 8 chunks", fontsize=11)
    for chunk in range(CHUNKS):
        axes.add_patch(
            Rectangle((1.65 * chunk, 6.9), 1.65, 0.5, fc=color(chunk), ec="white", lw=2)
        )
        axes.text(1.65 * (chunk + 0.5), 7.15, chunk, ha="center", va="center")


def draw_device(axes: Axes, ring: int, ulysses: int) -> None:
    """A device while it attends: T/R tokens of N/U heads."""
    left, bottom = 3.4 * ring, 3.5 - 2.9 * ulysses
    axes.add_patch(
        Rectangle((left, bottom), 2.9, 2.1, fc="#f4f4f4", ec="#444444", lw=1.2)
    )
    axes.text(
        left + 0.12, bottom + 1.82, f"ring {ring}, ulysses {ulysses}", fontsize=8.5
    )
    for column, chunk in enumerate(chunks_of(ring)):
        for row in range(HEADS // ULYSSES):
            head = ulysses * (HEADS // ULYSSES) + row
            corner = (left + 0.75 + 1.05 * column, bottom + 0.9 - 0.7 * row)
            axes.add_patch(Rectangle(corner, 1.0, 0.62, fc=color(chunk), ec="none"))
            axes.text(
                corner[0] + 0.5, corner[1] + 0.31, chunk, ha="center", va="center"
            )
            if not column:
                y = corner[1] + 0.31
                axes.text(left + 0.38, y, f"h{head}", ha="center", va="center", size=9)


def arrow(axes: Axes, start: tuple, end: tuple, style: str, bend: float = 0) -> None:
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle=style,
            mutation_scale=14,
            lw=1.8,
            color="#222222",
            connectionstyle=f"arc3,rad={bend}",
        )
    )


def draw() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9.2, 6.2), dpi=150)
    draw_sequence(axes)
    for ring in range(RING):
        for ulysses in range(ULYSSES):
            draw_device(axes, ring, ulysses)
        middle = 3.4 * ring + 1.45
        arrow(axes, (middle, 2.75), (middle, 3.45), "<|-|>")
    axes.text(0.1, 3.02, "all-to-all", fontsize=9.5, va="center")
    for ulysses in range(ULYSSES):
        y = 4.55 - 2.9 * ulysses
        for ring in range(RING - 1):
            arrow(axes, (3.4 * ring + 2.92, y), (3.4 * ring + 3.4, y), "-|>")
    arrow(axes, (11.6, 0.55), (1.5, 0.55), "-|>", -0.08)
    axes.text(
        6.6,
        -0.65,
        "each row is a ring: k, v move to the next device while a chunk is computed",
        ha="center",
        fontsize=10,
    )
    axes.text(
        0,
        6.05,
        "8 devices = ring 4 × ulysses 2. While attending, a device holds T/4 tokens "
        "of half the heads;\nbefore and after, T/8 tokens of all heads.",
        fontsize=10,
    )
    axes.set(xlim=(-0.15, 13.3), ylim=(-0.9, 8.0))
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def main() -> None:
    path = pathlib.Path(__file__).parent / "images" / "grid.png"
    draw().savefig(path, bbox_inches="tight", facecolor="white")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
