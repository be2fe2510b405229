"""Hostile checkpoint folders: each ends in a ValueError, or is loaded right."""

import itertools
import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import chex
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save, save_file

from tests.hostile import Case, check_all
from tests.models import hf_cases
from tests.models.hf_cases import CONFIGS
from usp_jax.models import hf
from usp_jax.models.llama import Llama

CONFIG = CONFIGS["plain"]
WEIGHTS = hf_cases.weights(CONFIG)
NAMES = sorted(WEIGHTS)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# A number that no float holds.
HUGE = 10**400

# Changes a good folder.
Damage = Callable[[Path], object]


class Folder(NamedTuple):
    """A damage, and whether the folder must, or may, still be loaded as it was."""

    name: str
    damage: Damage
    good: bool = False
    either: bool = False


def config(**keys: object) -> Damage:
    return text(json.dumps({**CONFIG, **keys}))


def text(content: str | bytes, name: str = "config.json") -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def sizes() -> Iterator[Folder]:
    keys = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ]
    bad = [-1, 0, True, False, "2", "", 2.0, 2.5, [], [2], {}, 10**8, 10**30, HUGE]
    for key, value in itertools.product(keys, bad):
        yield Folder(f"{key}={str(value)[:20]!r}", config(**{key: value}))
    yield Folder("layers=10**12", config(num_hidden_layers=10**12))
    many = {"num_hidden_layers": 10**9, "layer_types": ["full_attention"]}
    yield Folder("layer_types of 10**9 layers", config(**many))
    yield Folder("head_dim=null", config(head_dim=None), good=True)


def settings() -> Iterator[Folder]:
    bad = ["x", "", "nan", -1, 0, float("nan"), float("inf"), [], [1], {}, True, HUGE]
    for key, value in itertools.product(["rms_norm_eps", "rope_theta"], bad):
        yield Folder(f"{key}={str(value)[:20]!r}", config(**{key: value}))
    yield Folder("eps as text", config(rms_norm_eps="1e-5"), good=True)
    switches = ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_mrope"]
    for key, value in itertools.product(switches, ["false", "", 1.5, [], {}, [False]]):
        yield Folder(f"{key}={value!r}", config(**{key: value}))
    for key in switches:
        yield Folder(f"{key}=false", config(**{key: False}), good=True)
    for key in ("model_type", "torch_dtype", "architectures", "hidden_act"):
        for value in (5, [], {}, "x", ["x"], True):
            yield Folder(f"{key}={value!r}", config(**{key: value}))
    yield Folder("layer_types of one", config(layer_types=["full_attention"]))
    yield Folder("layer_types as text", config(layer_types="full_attention"))
    whole = ["full_attention"] * CONFIG["num_hidden_layers"]
    yield Folder("layer_types", config(layer_types=whole), good=True)
    yield Folder("notes of any kind", config(eos_token_id={"a": [1]}), good=True)


def ropes() -> Iterator[Folder]:
    numbers = ["x", None, -4, 0, 0.5, float("nan"), float("inf"), [], {}, True, HUGE]
    plain = {"factor": 4.0, "original_max_position_embeddings": 24}
    llama3 = {**plain, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn = {**plain, "beta_fast": 8.0, "beta_slow": 1.0, "attention_factor": 1.1}
    mscale = {**plain, "mscale": 1.0, "mscale_all_dim": 1.0}
    kinds = {
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        "llama3": llama3,
        "yarn": yarn,
    }
    for kind, keys in kinds.items():
        for key, value in itertools.product(keys, numbers):
            # Left out, these have a default; fractions of them are allowed.
            optional = key.startswith(("beta", "att", "orig")) and value is None
            fraction = value == 0.5 and key.startswith(("att", "beta_s", "low"))
            if not (optional or fraction):
                scaling = {"rope_type": kind, **keys, key: value}
                name = f"{kind} {key}={str(value)[:20]!r}"
                yield Folder(name, config(rope_scaling=scaling))
    for key, value in itertools.product(mscale, ("x", -1, [1], float("nan"))):
        scaling = {"rope_type": "yarn", **mscale, key: value}
        yield Folder(f"yarn {key}={value!r}", config(rope_scaling=scaling))
    # 0.1 · ln(factor) is 1: one divided by zero.
    zero = {**mscale, "factor": 22026.465794806718, "mscale_all_dim": -1.0}
    yield Folder("yarn 1 / 0", config(rope_scaling={"rope_type": "yarn", **zero}))
    flat = {"rope_type": "yarn", **yarn}
    for theta in (1, 0.5):
        keys = {"rope_theta": theta, "rope_scaling": flat}
        yield Folder(f"yarn of theta={theta}", config(**keys))
    for value in ("linear", "", 0, False, [], [1], 5, {"rope_type": []}, {"type": 1}):
        yield Folder(f"rope_scaling={value!r}", config(rope_scaling=value))
    yield Folder("rope_scaling={}", config(rope_scaling={}), good=True)


def texts() -> Iterator[Folder]:
    whole = json.dumps(CONFIG)
    bad = {
        "empty": "",
        "null": "null",
        "list": "[]",
        "number": "5",
        "no keys": "{}",
        "NUL": b"\0" * 400,
        "invalid UTF-8": b'{"a": "\xff"}',
        "UTF-16": whole.encode("utf-16"),
        "byte order mark": b"\xef\xbb\xbf" + whole.encode(),
        "deep list": '{"a":' + "[" * 200_000,
        "deep object": '{"a":' * 200_000,
        "many digits": '{"vocab_size":' + "9" * 5000 + "}",
        "two objects": whole + whole,
    }
    for name, content in bad.items():
        yield Folder(f"config.json: {name}", text(content))
        if name != "no keys":
            yield Folder(f"index: {name}", as_index(content))
    draw = random.Random(1)
    for length in sorted(draw.sample(range(1, len(whole)), 15)):
        yield Folder(f"config.json cut at {length}", text(whole[:length]))


def as_index(content: str | bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / SINGLE).rename(folder / "a.safetensors")
        text(content, INDEX)(folder)

    return damage


def index_of(places: object) -> Damage:
    return as_index(json.dumps({"weight_map": places}))


def indices() -> Iterator[Folder]:
    def all_in(place: object) -> Damage:
        return index_of(dict.fromkeys(NAMES, place))

    yield Folder("index", all_in("a.safetensors"), good=True)
    yield Folder("index of ./", all_in("./a.safetensors"), good=True)
    outside = "../outside/x.safetensors"
    for name in (outside, f"sub/../{outside}", "/etc/passwd", "/dev/zero", "~/x"):
        yield Folder(f"index names {name}", all_in(name))

    def absolute(folder: Path) -> None:
        index_of(dict.fromkeys(NAMES, str(folder.parent / outside[3:])))(folder)

    yield Folder("index names an absolute path", absolute)
    for name in ("link", "links/x.safetensors"):

        def linked(folder: Path, name: str = name) -> None:
            all_in(name)(folder)
            (folder / "link").symlink_to(folder / outside)
            (folder / "links").symlink_to(folder / ".." / "outside")

        yield Folder(f"index names {name}, which leaves the folder", linked)
    for place in (5, None, True, [], ["a.safetensors"], {}, "", ".", "a\0b", "\ud800"):
        yield Folder(f"index names {place!r}", all_in(place))
    yield Folder("index names a missing file", all_in("b.safetensors"))
    yield Folder("index names config.json", all_in("config.json"))
    some = dict.fromkeys(NAMES, "a.safetensors")
    yield Folder("index with a number", index_of({**some, NAMES[0]: 5}))
    yield Folder("index with one more", index_of({**some, "b": "a.safetensors"}))
    for places in (None, [], [1], 5, "a.safetensors", {}):
        yield Folder(f"weight_map={places!r}", index_of(places))

    def twice(folder: Path) -> None:
        all_in("a.safetensors")(folder)
        places = {**some, NAMES[0]: "b.safetensors"}
        text(json.dumps({"weight_map": places}), INDEX)(folder)
        save_file({n: WEIGHTS[n] for n in NAMES[:2]}, folder / "b.safetensors")

    yield Folder("a tensor in two files", twice, good=True)


def header(tensors: dict[str, object], data: bytes = b"") -> Damage:
    content = json.dumps(tensors).encode()
    return text(struct.pack("<Q", len(content)) + content + data, SINGLE)


def weights() -> Iterator[Folder]:
    whole = good_file()
    bad = {
        "empty": b"",
        "3 bytes": b"abc",
        "header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "header of 2**40 bytes": struct.pack("<Q", 2**40) + b"{}",
        "deep header": struct.pack("<Q", 100_005) + b'{"a":' + b"[" * 100_000,
        "4 bytes less": whole[:-4],
        "4 bytes more": whole + b"abcd",
    }
    for name, content in bad.items():
        yield Folder(f"weights: {name}", text(content, SINGLE))
    same = {
        n: {"dtype": "F32", "shape": list(x.shape), "data_offsets": [0, x.nbytes]}
        for n, x in WEIGHTS.items()
    }
    yield Folder("overlapping", header(same, bytes(WEIGHTS[NAMES[0]].nbytes)))
    for dtype, shape in (
        ("Q9", [1]),
        ("F32", [2**40, 2**40]),
        ("F32", [-1]),
        ("F32", [0]),
        ("F32", "1"),
        (None, [1]),
    ):
        one = {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, 4]}}
        yield Folder(f"a tensor of {dtype}{shape}", header(one, bytes(4)))
    for dtype in ("float64", "int8", "int32", "bool"):
        changed = {n: x.astype(dtype) for n, x in WEIGHTS.items()}
        yield Folder(f"weights of {dtype}", saved(changed))
    first = NAMES[0]
    for shape in ((), (1,), WEIGHTS[first].shape[::-1], (*WEIGHTS[first].shape, 1)):
        changed = {**WEIGHTS, first: np.zeros(shape, np.float32)}
        yield Folder(f"a tensor of shape {shape}", saved(changed))
    for name in NAMES[:5]:
        fewer = {n: x for n, x in WEIGHTS.items() if n != name}
        yield Folder(f"no {name}", saved(fewer))
        yield Folder(f"renamed {name}", saved({**fewer, f"{name}x": WEIGHTS[name]}))
    draw = random.Random(2)
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in sorted(draw.sample(range(len(whole)), 15)):
        yield Folder(f"weights cut at {length}", text(whole[:length], SINGLE))
    for _ in range(60):
        place, bit = draw.randrange(end), draw.randrange(8)
        changed = bytearray(whole)
        changed[place] ^= 1 << bit
        name = f"bit {bit} of byte {place} of the header"
        yield Folder(name, text(bytes(changed), SINGLE), either=True)


def good_file() -> bytes:
    return save(WEIGHTS, {"format": "pt"})


def saved(tensors: dict[str, np.ndarray]) -> Damage:
    return lambda folder: save_file(tensors, folder / SINGLE)


def things() -> Iterator[Folder]:
    """Something other than a file in place of each file, and of the folder."""

    def put(name: str, make: Callable[[Path], object]) -> Damage:
        def damage(folder: Path) -> None:
            if name == INDEX:
                index_of(dict.fromkeys(NAMES, "a.safetensors"))(folder)
            (folder / name).unlink()
            make(folder / name)

        return damage

    kinds: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "loop of links": lambda path: path.symlink_to(path),
        "endless device": lambda path: path.symlink_to("/dev/zero"),
        "empty device": lambda path: path.symlink_to("/dev/null"),
    }
    names = ("config.json", SINGLE, INDEX)
    for name, (kind, make) in itertools.product(names, kinds.items()):
        yield Folder(f"{name}: {kind}", put(name, make))
    for kind, make in kinds.items():

        def replaced(folder: Path, make: Callable[[Path], object] = make) -> None:
            shutil.rmtree(folder)
            make(folder)

        yield Folder(f"the folder itself: {kind}", replaced)


GENERATORS = (sizes, settings, ropes, texts, indices, weights, things)


def parameters(model: Llama) -> dict[str, np.ndarray]:
    return {n: np.asarray(x) for n, x in nnx.to_pure_dict(nnx.state(model)).items()}


@pytest.mark.parametrize("generate", GENERATORS, ids=lambda f: f.__name__)
def test_hostile_folders(generate, tmp_path):
    first = hf_cases.write(tmp_path / "good", CONFIG)
    good = hf.load(first)
    hf_cases.write(tmp_path / "outside", CONFIG)
    (tmp_path / "outside" / SINGLE).rename(tmp_path / "outside" / "x.safetensors")

    def case(number: int, folder: Folder) -> Case:
        path = tmp_path / f"{number}"

        def read() -> None:
            shutil.copytree(first, path)
            folder.damage(path)
            model = hf.load(path)
            assert model.config == good.config
            chex.assert_trees_all_equal(parameters(model), parameters(good))

        refusal = None if folder.good else str(path)
        return Case(folder.name, read, refusal, folder.either)

    check_all(case(*numbered) for numbered in enumerate(generate()))
