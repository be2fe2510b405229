"""Text to token ids and back: bytes, or a tokenizer.json."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

BYTES = "bytes"


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Converts text to token ids and back.

    Attributes:
      tokenizer: the tokenizer; None uses bytes as tokens.
      fingerprint: identifies the tokenizer by the content of its file, not by its
        formatting.
      source: the option that gave the tokenizer and its value, for errors.
    """

    tokenizer: Tokenizer | None = None
    fingerprint: str = BYTES
    source: str = BYTES

    @classmethod
    def load(cls, path: Path | None, option: str = "data.tokenizer") -> "Vocabulary":
        """Reads a tokenizer.json.

        Args:
          path: the file; None uses bytes as tokens.
          option: the name of `path` in errors.

        Raises:
          ValueError: there is no file at `path`, it cannot be read, or its vocabulary
            is empty or has ids that do not fit into int32.
        """
        if path is None:
            return cls()
        if not path.is_file():
            raise ValueError(
                f"{option}={path} does not exist; it must be a tokenizer.json"
            )
        source = f"{option}={path}"
        try:
            tokenizer = Tokenizer.from_file(str(path))
            content = json.dumps(json.loads(path.read_bytes()), sort_keys=True)
        # The library raises a bare Exception for any error.
        except Exception as error:
            raise ValueError(f"{source} is not a tokenizer.json: {error}") from error
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        if not ids:
            raise ValueError(f"{source} has an empty vocabulary")
        if max(ids) >= 2**31:
            raise ValueError(
                f"{source} has the token id {max(ids)}, which must be less than 2**31"
            )
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return cls(tokenizer, digest, source)

    @property
    def size(self) -> int:
        """The largest token id plus one."""
        if self.tokenizer is None:
            return 256
        return 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: bytes, *, special: bool = True) -> np.ndarray:
        """Encodes a document as int32 ids, with special tokens if `special`."""
        (ids,) = self.encode_all([text], special=special)
        return ids

    def encode_all(
        self, texts: Sequence[bytes], *, special: bool = True
    ) -> list[np.ndarray]:
        """Encodes each text as `encode` does; a tokenizer uses several cores.

        Raises:
          ValueError: the tokenizer cannot encode a text.
        """
        if self.tokenizer is None:
            return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]
        decoded = [text.decode(errors="replace") for text in texts]
        try:
            encodings = self.tokenizer.encode_batch_fast(
                decoded, add_special_tokens=special
            )
        # A bare Exception again; for instance, an unknown word without a token for it.
        except Exception as error:
            raise ValueError(
                f"{self.source} cannot encode the text: {error}"
            ) from error
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def encode_spans(
        self, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Encodes texts without further tokens, and finds what each token is of.

        Returns:
          For each text its ids, int32, and for each of them the first character that
          it is of, and the one after its last.

        Raises:
          ValueError: the tokenizer cannot encode a text.
        """
        if self.tokenizer is None:
            return [_byte_spans(text) for text in texts]
        try:
            encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        # A bare Exception, as above.
        except Exception as error:
            raise ValueError(
                f"{self.source} cannot encode the text: {error}"
            ) from error
        found = []
        for encoding in encodings:
            at = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
            found.append((np.asarray(encoding.ids, np.int32), at[:, 0], at[:, 1]))
        return found

    @property
    def special(self) -> tuple[str, ...]:
        """Texts of the special tokens, such as those that end a turn."""
        if self.tokenizer is None:
            return ()
        added = self.tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens that `encode` adds before a text, and those after it."""
        if self.tokenizer is None:
            return [], []
        encode = self.tokenizer.encode
        text, whole = (encode("a", add_special_tokens=x).ids for x in (False, True))
        # A tokenizer without any token for the letter adds nothing that shows.
        for start in range(len(whole) - len(text) + 1):
            if text and whole[start : start + len(text)] == text:
                return whole[:start], whole[start + len(text) :]
        return [], []

    def encode_start(self, text: str) -> np.ndarray:
        """Encodes the beginning of a text, without the tokens that end one."""
        before, _ = self.around()
        ids = self.encode(text.encode(), special=False)
        return np.concatenate([np.asarray(before, np.int32), ids])

    def decode(self, ids: np.ndarray) -> str:
        """Decodes token ids to text."""
        if self.tokenizer is None:
            return ids.astype(np.uint8).tobytes().decode(errors="replace")
        return self.tokenizer.decode(ids.tolist())


def _byte_spans(text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of a text, and the character that each is of."""
    encoded = [letter.encode(errors="replace") for letter in text]
    ids = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32)
    first = np.repeat(np.arange(len(text)), [len(x) for x in encoded])
    return ids, first, first + 1
