"""Digests of a checkpoint's files, to detect damage before restoring it.

Neither orbax nor the format that it writes detects a flipped bit in an array. The
digests are written before the folder is renamed into place, so a finished checkpoint
without digests is from a version that did not write them. Such a version did not write
the run's record either.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.files import sha256

NAME = "sha256.json"
# The record of the run, see `train.run_dir`.
RECORD = "config.json"
# Files without a digest. orbax writes the time into the second one at the very end.
_NOT_IN_IT = {NAME, "_CHECKPOINT_METADATA"}
# Hashing releases the GIL.
_THREADS = 8


def write_digests(folder: Path) -> None:
    """Adds a file of digests by file name to a folder that has been written."""
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = dict(zip(files, pool.map(sha256, files.values()), strict=True))
    (folder / NAME).write_text(json.dumps(digests, indent=1) + "\n")


def has_digests(folder: Path) -> bool:
    """Returns True if the folder has digests, so that damage can be detected."""
    return (folder / NAME).exists()


def read_intact(folder: Path, name: str) -> bytes | None:
    """Reads a file of a folder; None if it is missing, damaged or has no digest."""
    try:
        content = (folder / name).read_bytes()
        expected = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(expected, dict):
        return None
    return (
        content if expected.get(name) == hashlib.sha256(content).hexdigest() else None
    )


def damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Describes the damage to a folder.

    Args:
      folder: the folder of a checkpoint.
      part: the share of the files to read here, from 0.
      parts: number of shares into which the files are divided.

    Returns:
      A description, or None if there is no damage, or if the checkpoint is of a
      version without digests.
    """
    if not has_digests(folder):
        return f"{NAME} is missing" if (folder / RECORD).exists() else None
    try:
        expected = json.loads((folder / NAME).read_bytes())
    except ValueError:
        return f"{NAME} is not JSON"
    if not isinstance(expected, dict):
        return f"{NAME} is not a JSON object"
    files = _files(folder)
    if missing := sorted(expected.keys() - files.keys()):
        return f"{missing[0]} is missing"
    own = sorted(expected)[part::parts]
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = list(pool.map(sha256, [files[name] for name in own]))
    # The disk is broken, or the run has just removed the folder.
    except OSError as error:
        return f"it cannot be read: {error}"
    for name, digest in zip(own, digests, strict=True):
        if digest != expected[name]:
            return f"{name} has changed since it was written"
    return None


def _files(folder: Path) -> dict[str, Path]:
    """The files that have digests, by their path in the folder."""
    return {
        str(path.relative_to(folder)): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_IN_IT
    }
