"""A folder of safetensors files: a single file, or several with an index.

The format: https://huggingface.co/docs/safetensors.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

try:
    from safetensors import SafetensorError, safe_open
except ImportError as error:
    raise ImportError(
        "usp_jax.models.hf needs safetensors: pip install 'usp_jax[hf]'"
    ) from error

from usp_jax.checks import check_positive_int

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"


# A value of a JSON file.
Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None


def read_json(path: Path) -> dict[str, Json]:
    """Reads a JSON object from a file.

    Raises:
      ValueError: the file is missing or is not a JSON object; the message has its path.
    """
    _check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object")
    return content


def number(key: str, value: Json) -> float:
    """Converts a number, or the text of one, to a float.

    Raises:
      ValueError: the value is not a number; the message names the key.
    """
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        # OverflowError: an integer that no float holds.
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)
    raise ValueError(f"{key}={value!r} must be a number")


def positive_int(key: str, value: Json) -> int:
    """Returns a value after checking that it is a positive int.

    Raises:
      ValueError: it is not; the message names the key.
    """
    if not isinstance(value, int):
        raise ValueError(f"{key}={value!r} must be a positive int")
    check_positive_int(key, value)
    return value


def boolean(key: str, value: Json) -> bool:
    """Returns a value after checking that it is true or false.

    Raises:
      ValueError: it is not; the message names the key.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")
    return value


@runtime_checkable
class _Slice(Protocol):
    """A tensor in a file, as safetensors returns it from a class it does not export."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class TensorFiles:
    """Tensors of a checkpoint, read slice by slice from memory-mapped files."""

    def __init__(
        self, folder: Path, files: Mapping[str, safe_open], places: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._files = files
        self._places = places
        self._starts: dict[str, dict[str, int]] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator["TensorFiles"]:
        """Opens the files of a folder until the context ends.

        Raises:
          ValueError: there are no files, or one is missing, damaged or does not match
            the index.
        """
        with contextlib.ExitStack() as stack:
            files: dict[str, safe_open] = {}
            places: dict[str, str] = {}
            index = _index(folder)
            names = [SINGLE] if index is None else sorted(set(index.values()))
            for name in names:
                files[name] = stack.enter_context(_open(folder / name))
            held = {name: set(file.keys()) for name, file in files.items()}
            for name, tensors in held.items():
                places |= dict.fromkeys(tensors, name)
            for tensor, name in ({} if index is None else index).items():
                if tensor not in held[name]:
                    raise ValueError(
                        f"{folder / INDEX} says that {tensor} is in {name}, "
                        "which does not have it"
                    )
                places[tensor] = name
            yield cls(folder, files, places)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor by its safetensors name: F32, BF16, F16."""
        return self._slice(name).get_dtype()

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of a tensor, and no other part of it."""
        if self.dtype(name) == "F8_E4M3":
            return np.array(self._float8(name)[index])
        return self._slice(name)[index]

    def _float8(self, name: str) -> np.ndarray:
        """A tensor of 8-bit floats, mapped from its file.

        safetensors does not return slices of this dtype as numpy arrays.
        """
        file = self._places[name]
        path = self._folder / file
        if file not in self._starts:
            self._starts[file] = _starts(path)
        start, shape = self._starts[file][name], self.shape(name)
        return np.memmap(path, np.uint8, "r", start, shape).view(jnp.float8_e4m3fn)

    def _slice(self, name: str) -> _Slice:
        return self._files[self._places[name]].get_slice(name)


def _starts(path: Path) -> dict[str, int]:
    """The number of the first byte of each tensor in a file that safetensors opened."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {name: 8 + length + x["data_offsets"][0] for name, x in header.items()}


def split_into_files(sizes: Mapping[str, int], file_bytes: int) -> dict[str, list[str]]:
    """Assigns tensors to files in order, filling each file before the next.

    A tensor larger than `file_bytes` gets a file of its own.

    Args:
      sizes: bytes of each tensor.
      file_bytes: maximum bytes of a file.

    Returns:
      Names of tensors, keyed by file name.
    """
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > file_bytes:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": group
        for number, group in enumerate(groups, 1)
    }


def _index(folder: Path) -> dict[str, str] | None:
    """Maps each tensor to its file's name; None if a single file has all tensors."""
    # A link that leads nowhere, or to itself, exists too: it is reported, not ignored.
    if os.path.lexists(folder / SINGLE):
        return None
    if os.path.lexists(folder / INDEX):
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise ValueError(f"{folder / INDEX} has no weight_map")
        places: dict[str, str] = {}
        for tensor, file in index.items():
            if not isinstance(file, str):
                raise ValueError(
                    f"{folder / INDEX} places {tensor} in {file!r}, which must be the "
                    "name of a file"
                )
            places[tensor] = file
        for file in sorted(set(places.values())):
            _check_place(folder, file)
        return places
    others = sorted(path.name for path in folder.glob("*.bin"))
    if others:
        raise ValueError(
            f"{folder} has its weights in {', '.join(others)} only, which can run code "
            "when they are read; save them as safetensors first: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _check_place(folder: Path, file: str) -> None:
    """Checks that a file named by the index is in the folder.

    In the cache of Hugging Face a checkpoint's files are links to `../../blobs`, which
    are followed.

    Raises:
      ValueError: the file is elsewhere, or its name is impossible.
    """
    try:
        path, whole = (folder / file).resolve(), folder.resolve()
    # RuntimeError: a loop of links, before Python 3.13.
    except (ValueError, OSError, RuntimeError):
        raise ValueError(
            f"{folder / INDEX} names {file!r}, which no file has"
        ) from None
    allowed = [whole]
    if whole.parent.name == "snapshots":
        allowed.append(whole.parent.parent / "blobs")
    if not any(path.is_relative_to(root) for root in allowed):
        raise ValueError(
            f"{folder / INDEX} names {file!r}, which is outside the folder: {path}"
        )


def _open(path: Path) -> safe_open:
    if not os.path.lexists(path):
        raise ValueError(f"{path} does not exist, but {INDEX} names it")
    _check_file(path)
    try:
        return safe_open(path, framework="np")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _check_file(path: Path) -> None:
    """Checks that a file can be read to its end, which a pipe or a device cannot.

    Raises:
      ValueError: there is no file.
    """
    if not path.is_file():
        detail = "is not a file" if os.path.lexists(path) else "does not exist"
        raise ValueError(f"{path} {detail}")
