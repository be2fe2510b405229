"""Draws docs/images/delta.png: how states pass the chunks of a zigzag ring.

python -m docs.make_delta_picture
"""

import pathlib

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from docs.make_picture import CHUNKS, RING, arrow, chunks_of, color

# Width of a chunk in the text, and of a device's column.
WIDTH, COLUMN = 1.65, 3.4


def draw_chunk(
    axes: Axes, chunk: int, left: float, bottom: float, width: float
) -> None:
    box = Rectangle((left, bottom), width, 0.5, fc=color(chunk), ec="white", lw=2)
    axes.add_patch(box)
    axes.text(left + width / 2, bottom + 0.25, chunk, ha="center", va="center")


def draw_text(axes: Axes) -> None:
    axes.text(
        0, 8.0, "A state passes 8 chunks of the text, one after the other", size=11
    )
    for chunk in range(CHUNKS):
        draw_chunk(axes, chunk, WIDTH * chunk, 6.9, WIDTH)
        arrow(
            axes,
            (WIDTH * (chunk + 0.12), 7.5),
            (WIDTH * (chunk + 0.88), 7.5),
            "-|>",
            -0.25,
        )


def draw_device(axes: Axes, ring: int) -> None:
    """A device with its two chunks, from their maps to their outputs."""
    left = COLUMN * ring
    frame = Rectangle((left, 0.2), 2.9, 5.2, fc="#f4f4f4", ec="#444444", lw=1.2)
    axes.add_patch(frame)
    axes.text(left + 0.12, 5.1, f"ring {ring}", fontsize=8.5)
    for slot, chunk in enumerate(chunks_of(ring)):
        x = left + 0.2 + 1.3 * slot
        draw_chunk(axes, chunk, x, 4.45, 1.2)
        arrow(axes, (x + 0.6, 4.42), (x + 0.6, 3.98), "-|>")
        axes.text(x + 0.6, 3.75, f"$A_{chunk}, B_{chunk}$", ha="center", va="center")
        arrow(axes, (x + 0.6, 3.52), (x + 0.6, 3.08), "-|>")
        arrow(axes, (x + 0.6, 2.48), (x + 0.6, 2.04), "-|>")
        axes.text(x + 0.6, 1.82, f"$S_{chunk}$", ha="center", va="center")
        arrow(axes, (x + 0.6, 1.6), (x + 0.6, 1.16), "-|>")
        draw_chunk(axes, chunk, x, 0.6, 1.2)


def draw() -> plt.Figure:
    figure, axes = plt.subplots(figsize=(9.2, 6.0), dpi=150)
    draw_text(axes)
    axes.text(
        0,
        5.75,
        "On a zigzag ring of 4, each device has an early and a late chunk:",
        fontsize=11,
    )
    for ring in range(RING):
        draw_device(axes, ring)
    band = Rectangle((-0.1, 2.5), COLUMN * RING - 0.3, 0.55, fc="#dddddd", ec="none")
    axes.add_patch(band)
    axes.text(
        COLUMN * RING / 2 - 0.25,
        2.77,
        "all-gather of 8 maps; each device composes those before its chunks",
        ha="center",
        va="center",
        fontsize=9.5,
    )
    notes = (4.7, "chunks"), (3.75, "maps"), (1.82, "states before"), (0.85, "outputs")
    for y, note in notes:
        axes.text(COLUMN * RING - 0.35, y, note, va="center", fontsize=9)
    axes.set(xlim=(-0.15, COLUMN * RING + 1.5), ylim=(0, 8.4))
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def main() -> None:
    path = pathlib.Path(__file__).parent / "images" / "delta.png"
    draw().savefig(path, bbox_inches="tight", facecolor="white")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
