"""Units of memory, and numbers of tokens as people write them."""

GIB = 2**30


def tokens_of(name: str, text: str) -> int:
    """The number of tokens in "4096", "64K" or "1M".

    Args:
      name: what stands before the text in a message.
      text: a decimal number; K is 1024, M is 1024 K.

    Raises:
      ValueError: another text.
    """
    units = {"K": 2**10, "M": 2**20}
    unit = units.get(text[-1:].upper(), 1)
    number = text if unit == 1 else text[:-1]
    if not number.isdecimal():
        raise ValueError(f"{name}={text!r} must be a number like 4096, 64K or 1M")
    return int(number) * unit
