"""Units of memory, and the formatting of bytes and parsing of token counts."""

GIB = 2**30


def bytes_text(size: float | int) -> str:
    """Formats a number of bytes with its unit, such as "48.0 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:,.1f} {unit}"


def tokens_of(name: str, text: str) -> int:
    """Parses a number of tokens, such as "4096", "64K" or "1M".

    Args:
      name: name of the value, for error messages.
      text: a decimal number, optionally followed by K (1024) or M (1024 K).

    Raises:
      ValueError: the text has another form.
    """
    units = {"K": 2**10, "M": 2**20}
    unit = units.get(text[-1:].upper(), 1)
    number = text if unit == 1 else text[:-1]
    if not number.isdecimal():
        raise ValueError(f"{name}={text!r} must be a number like 4096, 64K or 1M")
    return int(number) * unit
