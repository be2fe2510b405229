"""Words of a command line, and of the lines that commands print."""

import shutil
import sys
import textwrap
from collections.abc import Sequence


def check_no_empty_value(words: Sequence[str], allowed: Sequence[str] = ()) -> None:
    """Raises ValueError if an option or a position has the empty string as its value.

    Such a value comes from an unset variable of a shell. As a path, it would be the
    current directory.

    Args:
      words: the words of a command line.
      allowed: options whose value may be empty.
    """
    name = "path"
    for word in words:
        value = word
        if word.startswith("--"):
            name, has_value, value = word.partition("=")
            if not has_value:
                continue
        if not value and name.replace("_", "-") not in allowed:
            raise ValueError(
                f"{name}='' must not be empty: leave it out or give a value; the "
                "current directory is '.'"
            )


def printable(text: str) -> str:
    """Replaces control characters, which could move a terminal's cursor or colour it.

    New lines and tabs stay. A model may generate any byte.
    """
    controls = {*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}
    return text.translate(dict.fromkeys(controls, "\ufffd"))


def filled(text: str) -> str:
    """Breaks long lines between words, if they are printed on a terminal."""
    if not sys.stdout.isatty():
        return text
    wrapper = textwrap.TextWrapper(
        shutil.get_terminal_size().columns,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(map(wrapper.fill, text.splitlines()))


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 document", "1,200 documents"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
