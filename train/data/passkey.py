"""Passkey retrieval: find five digits in a long, meaningless text.

A document is filler with `key:31425.` at a random depth, and ends with `key:31425`,
whose five digits are to be predicted. The task is that of Mohtashami and Jaggi (arXiv
2305.16300, section 4.2) on bytes. The digits of a key are distinct, so each byte of the
answer follows from the previous one. Rows are generated from their number, so the data
are the same on every mesh and can resume at any row.
"""

import dataclasses

import grain
import numpy as np

from train.config import Config, PasskeyConfig
from train.data.corpus import Row

DIGITS = 5
QUESTION = b"key:"
# Everything but filler: the needle `key:31425.` and the question with its answer.
SHORTEST = 2 * (len(QUESTION) + DIGITS) + 1
# Rows are endless; grain needs a length.
ROWS = 2**31 - 1
WORDS = (
    b"the grass is green and sky blue sun yellow here we go there back again river "
    b"runs under old bridge while birds sing of winter snow"
).split()


def passkey_rows(config: Config) -> grain.MapDataset:
    """The rows of a run, in training order.

    Raises:
      ValueError: documents too short for a key, or an option for text that would be
        ignored.
    """
    shortest, length = config.passkey.shortest, config.sequence_length
    if not SHORTEST <= shortest <= length:
        raise ValueError(
            f"passkey.shortest={shortest} must be at least {SHORTEST} and at most "
            f"sequence_length={length}"
        )
    for name in ("path", "mixture", "tokenizer", "eval_fraction", "across_documents"):
        if getattr(config.data, name):
            raise ValueError(
                f"data.{name}={getattr(config.data, name)} is not used with "
                "passkey.enabled: leave out one of the two"
            )
    rows = PasskeyRows(config.passkey, length, config.seed)
    return grain.MapDataset.source(rows)


def filler(draw: np.random.Generator, length: int) -> bytes:
    """Random words cut to `length` bytes, without digits or the question's words."""
    words = draw.integers(len(WORDS), size=length // 3 + 1)
    return b" ".join(WORDS[word] for word in words).ljust(length)[:length]


def document(draw: np.random.Generator, length: int, depth: float) -> bytes:
    """A document of `length` bytes that ends with the answer.

    Args:
      draw: the random generator to use.
      length: bytes in the document.
      depth: position of the key in the filler, from 0 (start) to 1 (end).

    Raises:
      ValueError: `length` is too short for key and question.
    """
    if length < SHORTEST:
        raise ValueError(f"length={length} must be at least {SHORTEST}")
    digits = bytes(ord("0") + digit for digit in draw.permutation(10)[:DIGITS])
    text = filler(draw, length - SHORTEST)
    place = round(depth * len(text))
    needle = QUESTION + digits + b"."
    return text[:place] + needle + text[place:] + QUESTION + digits


@dataclasses.dataclass(frozen=True)
class PasskeyRows:
    """Rows of packed documents by number, a random-access source for grain."""

    config: PasskeyConfig
    length: int
    seed: int

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Row:
        """A row in which only answers have labels."""
        draw = np.random.default_rng((self.seed, index))
        row = Row(
            tokens=np.zeros(self.length, np.int32),
            labels=np.full(self.length, -1, np.int32),
            segment_ids=np.full(self.length, -1, np.int32),
        )
        start = 0
        for number, length in enumerate(self.lengths(draw, index)):
            text = document(draw, length, draw.uniform())
            end = start + length
            row["tokens"][start:end] = np.frombuffer(text, np.uint8)
            row["segment_ids"][start:end] = number
            # Each digit is the label of the token before it.
            row["labels"][end - DIGITS - 1 : end - 1] = row["tokens"][
                end - DIGITS : end
            ]
            start = end
        return row

    def lengths(self, draw: np.random.Generator, index: int) -> list[int]:
        """Lengths of the documents in a row.

        The longest grows with the row's number, from `shortest` to a whole row. Every
        other row has only documents of that length. The rest also have short ones,
        which teach more per token. The expected number of tokens in documents of n to
        2n tokens is the same for any n.
        """
        shortest = self.config.shortest
        growth = self.config.growth_rows
        grown = min(1.0, index / growth) if growth else 1.0
        longest = shortest * (self.length / shortest) ** grown
        least = longest if index % 2 else shortest
        lengths: list[int] = []
        left = self.length
        while left >= shortest:
            # Lengths have a density of 1 / length^2.
            rarest = 1 - least / longest
            length = round(least / (1 - draw.uniform(high=rarest)))
            lengths.append(min(length, left))
            left -= lengths[-1]
        return lengths
