"""Draws docs/images/terminal-NAME.svg: what the commands of the pages print.

    python -m docs.make_terminal_pictures [NAME ...]

The commands run in the order printed, in a clone, on this machine's CPUs, in a terminal
of 80 columns; it takes minutes. Runs are short, and a tiny model stands in for
Qwen3-0.6B. Needs `pip install '.[train,aot]'`, and Linux.
"""

import argparse
import dataclasses
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

import jax
import rich.console
import rich.terminal_theme
import rich.text

from docs.reader import TALKS, write_files

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
COLUMNS = 80


@dataclasses.dataclass(frozen=True)
class Picture:
    """A command and its picture.

    Attributes:
      name: the name of the file, without "terminal-" and ".svg".
      page: the page that shows it.
      command: the command as that page, or the README, prints it.
      more: options that make it short.
      typed: lines that are typed into it.
      after: the picture whose command makes the run that it uses.
    """

    name: str
    page: str
    command: str
    more: str = ""
    typed: tuple[str, ...] = ()
    after: str | None = None

    @property
    def line(self) -> str:
        """The command as it is run."""
        return f"{self.command} {self.more}".strip()

    @property
    def path(self) -> Path:
        """The picture's file."""
        return IMAGES / f"terminal-{self.name}.svg"


TUNED = (
    "--data.path talks.jsonl --data.tokenizer Qwen3-0.6B/tokenizer.json "
    "--sequence-length 4096 --lora.rank 16"
)
PICTURES = (
    Picture(
        "train",
        "docs/training",
        "python -m train tiny --mesh.ring 2 --mesh.ulysses 4 --steps 100 "
        "--run-dir runs/mine",
    ),
    Picture(
        "generate",
        "docs/using",
        'python -m train.generate runs/mine "def " "class " --length 100 --top-p 0.9',
        after="train",
    ),
    Picture(
        "evaluate", "docs/using", "python -m train.evaluate runs/mine", after="train"
    ),
    Picture(
        "export",
        "docs/using",
        "python -m train.export runs/mine exported/",
        after="train",
    ),
    Picture(
        "lora",
        "docs/fine-tuning",
        "python -m train qwen3-0.6b --init-from Qwen3-0.6B/ --run-dir runs/lora "
        f"{TUNED}",
        "--fake-devices 2 --mesh.ring 2 --batch-size 2 --steps 40 "
        "--optimizer.learning-rate 0.02 --optimizer.warmup-steps 5 --sample.length 0",
    ),
    Picture(
        "chat",
        "docs/fine-tuning",
        "python -m train.generate runs/lora --chat",
        "--temperature 0",
        typed=tuple(TALKS),
        after="lora",
    ),
    Picture(
        "plan",
        "docs/planning",
        "python -m usp_jax.plan --model llama3-8b --machine v5p --devices 64 "
        "--sequence 256K",
    ),
    Picture(
        "aot",
        "docs/how-it-works",
        "python -m usp_jax.aot h100:2x8 --ring 2 --ulysses 8 --length 256K --backward",
    ),
)


def output_of(picture: Picture, folder: Path) -> str:
    """Runs a command in a terminal, and returns what it wrote.

    Raises:
      RuntimeError: it failed.
    """
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("4H", 50, COLUMNS, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"TERM": "xterm-256color", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, *shlex.split(picture.line)[1:]],
        cwd=folder,
        env=environment,
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    typed, written = list(picture.typed), b""
    while True:
        try:
            part = os.read(ours, 65536)
        # Linux's end of a terminal.
        except OSError:
            break
        if not part:
            break
        written += part
        if picture.typed and written.endswith(b"> "):
            line = f"{typed.pop(0)}\n".encode() if typed else b"\x04"
            os.write(ours, line)
    os.close(ours)
    text = written.decode()
    if process.wait():
        raise RuntimeError(f"{picture.line} failed:\n{text}")
    return text


_CODE = re.compile(r"(\r\n|\r|\n|\x1b\[[?\d;]*[A-Za-z])")
_UP, _ERASE = re.compile(r"\x1b\[(\d*)A"), re.compile(r"\x1b\[[02]?K")


def settled(written: str) -> str:
    """Returns what is left on a terminal, with its colours.

    It knows the codes of spinners and bars: they go back to a line and write it anew.
    """
    lines, is_back = [""], False
    for part in _CODE.split(written):
        if part in ("\n", "\r\n"):
            lines.append("")
            is_back = False
        elif part == "\r":
            is_back = True
        elif _ERASE.fullmatch(part):
            lines[-1] = ""
        elif up := _UP.fullmatch(part):
            del lines[len(lines) - int(up[1] or 1) :]
        elif part and (part.endswith("m") or not part.startswith("\x1b")):
            lines[-1] = part if is_back else lines[-1] + part
            is_back = False
    return "\n".join(lines)


# Without the fonts that rich would load from the network.
FRAME = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace;
font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 15px; font-family: ui-monospace, Menlo, Consolas,
monospace; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})"
clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def drawn(picture: Picture, text: str) -> str:
    """Returns the SVG of a command and its output."""
    file = io.StringIO()
    console = rich.console.Console(
        record=True, width=COLUMNS, file=file, highlight=False
    )
    for line in [*typed_lines(picture.line), *text.rstrip().splitlines()]:
        whole = rich.text.Text.from_ansi(line)
        # As a terminal wraps: anywhere.
        for piece in whole.divide(range(COLUMNS, len(whole), COLUMNS)):
            console.print(piece, no_wrap=True)
    return console.export_svg(
        title="",
        theme=rich.terminal_theme.DEFAULT_TERMINAL_THEME,
        code_format=FRAME,
        unique_id=picture.name,
    )


def typed_lines(command: str) -> list[str]:
    """Returns a command as it is typed, continued where a line would be too long."""
    lines = ["$"]
    for word in re.findall(r'(?:[^\s"]|"[^"]*")+', command):
        if len(lines[-1]) + len(word) > COLUMNS - 4:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}"
    return lines


def main() -> None:
    """Runs the commands, and draws the pictures."""
    names = [picture.name for picture in PICTURES]
    parser = argparse.ArgumentParser(prog="python -m docs.make_terminal_pictures")
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"Draw only these: {', '.join(names)}.",
    )
    wanted = parser.parse_args().names or names
    jax.config.update("jax_platforms", "cpu")
    if unknown := set(wanted) - set(names):
        parser.error(f"{', '.join(sorted(unknown))} must be one of {', '.join(names)}")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "usp_jax"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        write_files(folder)
        needed = {*wanted, *(x.after for x in PICTURES if x.name in wanted)}
        for picture in (picture for picture in PICTURES if picture.name in needed):
            print(picture.line, flush=True)
            text = output_of(picture, folder)
            if picture.name in wanted:
                picture.path.write_text(drawn(picture, settled(text)))


if __name__ == "__main__":
    main()
