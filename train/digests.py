"""Digests of a checkpoint's files, by which damage is found before it is restored.

Neither orbax nor the format that it writes would see a flipped bit in an array. The
digests are written into the folder before it gets its name, so a checkpoint that has a
name and no digests is one from before there were any.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.files import sha256

NAME = "sha256.json"
# orbax writes the time into the second one when all else is done.
_NOT_IN_IT = {NAME, "_CHECKPOINT_METADATA"}
# Hashing lets other threads run.
_THREADS = 8


def write_digests(folder: Path) -> None:
    """Reads what has been written, and adds a file of digests by name."""
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(files, pool.map(sha256, files.values()), strict=True))
    (folder / NAME).write_text(json.dumps(found, indent=1) + "\n")


def has_digests(folder: Path) -> bool:
    """Whether damage would be found."""
    return (folder / NAME).exists()


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a folder, in words; None for nothing, or without digests.

    Args:
      part: of `parts`: which share of the files is read here.
    """
    if not has_digests(folder):
        return None
    try:
        expected = json.loads((folder / NAME).read_bytes())
    except ValueError:
        return f"{NAME} is no JSON"
    files = _files(folder)
    if missing := sorted(expected.keys() - files.keys()):
        return f"{missing[0]} is missing"
    own = sorted(expected)[part::parts]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(sha256, [files[name] for name in own])
        for name, digest in zip(own, found, strict=True):
            if digest != expected[name]:
                return f"{name} is not as it was written"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """What has a digest, by its path in the folder."""
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_IN_IT
    }
