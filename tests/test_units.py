"""Numbers with units are read and written."""

import pytest

from usp_jax.units import bytes_text, tokens_of


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (48.5 * 2**20, "48.5 MiB"),
        (2**40, "1,024.0 GiB"),
    ],
)
def test_bytes_have_a_unit(size, text):
    assert bytes_text(size) == text


def test_tokens_are_read():
    assert [tokens_of("n", x) for x in ("4096", "64K", "1M")] == [4096, 2**16, 2**20]
    with pytest.raises(ValueError, match="n='6.5K' must be a number like 4096"):
        tokens_of("n", "6.5K")
