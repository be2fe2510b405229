"""Quantized weights, which are dequantized while slices of them are read.

There are two formats, named by `quantization_config` of config.json:

* "fp8" (DeepSeek-V3): a matrix `x.weight` of 8-bit floats, and in `x.weight_scale_inv`
  a factor for each block of it, such as 128 x 128.
* "mxfp4" (gpt-oss): 4-bit floats in blocks of 32 along a matrix's inner dim, two in
  each byte of `x_blocks`, and in `x_scales` an exponent for each block (OCP
  Microscaling Formats 1.0).
"""

from typing import Protocol, runtime_checkable

import numpy as np

from usp_jax.models.hf.files import Json, TensorFiles

_KEY = "quantization_config"
_SCALE = "_scale_inv"
_BLOCKS, _SCALES = "_blocks", "_scales"
# Numbers in a block, and bytes.
_BLOCK, _BYTES = 32, 16
# The 4-bit floats: a sign, two bits of exponent and one of mantissa.
_MAGNITUDES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
_FP4 = np.array([*_MAGNITUDES, *(-x for x in _MAGNITUDES)], np.float32)

Index = tuple[slice, ...]


@runtime_checkable
class Tensors(Protocol):
    """The tensors of a checkpoint, read slice by slice."""

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""

    def dtype(self, name: str) -> str:
        """Returns the dtype of a tensor by its safetensors name."""

    def read(self, name: str, index: Index) -> np.ndarray:
        """Reads a slice of a tensor, and no more than the blocks that have it."""


def check_quantization(settings: Json) -> None:
    """Checks the value of `quantization_config`.

    Raises:
      ValueError: it is not one of the formats that are read.
    """
    if settings is not None and not _is_mxfp4(settings) and _block(settings) is None:
        raise ValueError(
            f"{_KEY}={settings!r} is not supported; it must be null or left out, or "
            "have the quant_method 'mxfp4', or 'fp8' with the fmt 'e4m3' and a "
            "weight_block_size"
        )


def dequantized(files: TensorFiles, settings: Json) -> Tensors:
    """Returns the tensors of a checkpoint, dequantized.

    Args:
      files: the tensors in the files.
      settings: a `quantization_config` that `check_quantization` accepts.
    """
    if _is_mxfp4(settings):
        return _FourBit(files)
    block = _block(settings)
    return files if block is None else _EightBit(files, block)


def _is_mxfp4(settings: Json) -> bool:
    return isinstance(settings, dict) and settings.get("quant_method") == "mxfp4"


def _block(settings: Json) -> tuple[int, int] | None:
    """The size of fp8's blocks; None if the weights are not in this format."""
    if not isinstance(settings, dict) or settings.get("quant_method") != "fp8":
        return None
    size = settings.get("weight_block_size")
    if not isinstance(size, list) or settings.get("fmt", "e4m3") != "e4m3":
        return None
    block = tuple(x for x in size if type(x) is int and x > 0)
    return (block[0], block[1]) if len(block) == len(size) == 2 else None


class _EightBit:
    """Tensors of which some are 8-bit floats with a factor for each block."""

    def __init__(self, files: TensorFiles, block: tuple[int, int]) -> None:
        self._files = files
        self._block = block
        self._scaled = _with(files, _SCALE)

    @property
    def names(self) -> set[str]:
        return self._files.names - {name + _SCALE for name in self._scaled}

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._files.shape(name)
        if name in self._scaled:
            blocks = tuple(
                -(-size // block)
                for size, block in zip(shape, self._block, strict=True)
            )
            _check_shape(self._files, name + _SCALE, blocks)
        return shape

    def dtype(self, name: str) -> str:
        dtype = self._files.dtype(name)
        return "F32" if name in self._scaled and dtype == "F8_E4M3" else dtype

    def read(self, name: str, index: Index) -> np.ndarray:
        x = self._files.read(name, index)
        if name not in self._scaled:
            return x
        places = [
            np.arange(*part.indices(size)) // block
            for part, size, block in zip(
                index, self._files.shape(name), self._block, strict=True
            )
        ]
        around = tuple(slice(own[0], own[-1] + 1) for own in places)
        scales = self._files.read(name + _SCALE, around).astype(np.float32)
        rows, columns = (own - own[0] for own in places)
        return x.astype(np.float32) * scales[rows[:, None], columns]


class _FourBit:
    """Tensors of which some are 4-bit floats with an exponent for each block.

    The tensor x [E, D, R] consists of x_blocks [E, R, D/32, 16] and x_scales
    [E, R, D/32].
    """

    def __init__(self, files: TensorFiles) -> None:
        self._files = files
        self._packed = _with(files, _SCALES, _BLOCKS)

    @property
    def names(self) -> set[str]:
        packed = {name + end for name in self._packed for end in (_BLOCKS, _SCALES)}
        return (self._files.names - packed) | self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._packed:
            return self._files.shape(name)
        shape = self._files.shape(name + _BLOCKS)
        _check_shape(self._files, name + _BLOCKS, (*shape[:3], _BYTES))
        _check_shape(self._files, name + _SCALES, shape[:3])
        experts, rows, blocks, _ = shape
        return experts, blocks * _BLOCK, rows

    def dtype(self, name: str) -> str:
        if name not in self._packed:
            return self._files.dtype(name)
        dtypes = [self._files.dtype(name + end) for end in (_BLOCKS, _SCALES)]
        return next((dtype for dtype in dtypes if dtype != "U8"), "F32")

    def read(self, name: str, index: Index) -> np.ndarray:
        if name not in self._packed:
            return self._files.read(name, index)
        shape = self.shape(name)
        experts, inner, rows = (
            range(*part.indices(size)) for part, size in zip(index, shape, strict=True)
        )
        first, last = inner.start // _BLOCK, -(-inner.stop // _BLOCK)
        own = slice(inner.start - first * _BLOCK, inner.stop - first * _BLOCK)
        out = np.empty([len(experts), len(inner), len(rows)], np.float32)
        # One expert at a time: the numbers take eight times the memory of the bytes.
        for number, expert in enumerate(experts):
            where = (
                slice(expert, expert + 1),
                slice(rows.start, rows.stop),
                slice(first, last),
            )
            scales = self._files.read(name + _SCALES, where)[0]
            packed = self._files.read(name + _BLOCKS, (*where, slice(0, _BYTES)))[0]
            x = _FP4[np.stack([packed & 15, packed >> 4], -1)]
            x = x.reshape(*scales.shape, _BLOCK)
            x = np.ldexp(x, scales.astype(np.int32)[..., None] - 127)
            out[number] = x.reshape(len(rows), -1)[:, own].T
        return out


def _with(files: TensorFiles, *ends: str) -> set[str]:
    """The names that are followed by each of some ends in names of tensors."""
    names = files.names
    first = ends[0]
    found = {name.removesuffix(first) for name in names if name.endswith(first)}
    others = ends[1:] or ("",)
    return {name for name in found if all(name + end in names for end in others)}


def _check_shape(files: TensorFiles, name: str, shape: tuple[int, ...]) -> None:
    if files.shape(name) != shape:
        raise ValueError(
            f"{name} is {list(files.shape(name))}; it must be {list(shape)}, one entry "
            "for each block of the weights"
        )
