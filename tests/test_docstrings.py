"""Public names are in the reference, with documented arguments and errors."""

import ast
import importlib
import inspect
import pathlib
import re
import textwrap
import types

import pytest

import usp_jax

ROOT = pathlib.Path(__file__).parent.parent
IN_REFERENCE = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE)
]
# Their docstrings cite the paper of the mathematics.
WITH_SOURCE = [
    "usp_jax.usp_attention",
    "usp_jax.usp_attention_per_shard",
    "usp_jax.models.rope_scaling.LinearScaling",
    "usp_jax.models.rope_scaling.YarnScaling",
]


def find(name: str) -> object:
    """The object of a dotted name; imports its module."""
    module, _, rest = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), rest)


def public() -> dict[str, object]:
    """All objects in the reference, with the public members of modules and classes."""
    found: dict[str, object] = {}
    for name in IN_REFERENCE:
        thing = find(name)
        found[name] = thing
        if isinstance(thing, types.ModuleType | type):
            own = thing.__name__ if isinstance(thing, types.ModuleType) else None
            for key, value in vars(thing).items():
                is_own = own is None or getattr(value, "__module__", None) == own
                if not key.startswith("_") and is_own and inspect.isroutine(value):
                    found[f"{name}.{key}"] = value
                elif own and is_own and inspect.isclass(value) and key[0] != "_":
                    found[f"{name}.{key}"] = value
    return found


PUBLIC = public()
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}


def test_the_reference_has_every_public_name() -> None:
    assert len(PUBLIC) > 50
    functions = {f"usp_jax.{name}" for name in usp_jax.__all__}
    assert functions - {"usp_jax.SAVED_NAMES"} <= set(IN_REFERENCE)


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_a_docstring(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name])
    assert text and text[0].isupper() or text.startswith("`") or text[0] in "([", text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_named(name: str) -> None:
    """Each argument is named in the docstring, or in one that it refers to."""
    text = inspect.getdoc(FUNCTIONS[name]) or ""
    sent = re.findall(r"`(\w+)`", text)
    text += "".join(inspect.getdoc(f) or "" for f in map(by_last_name, sent) if f)
    names = [x for x in inspect.signature(FUNCTIONS[name]).parameters if x != "self"]
    missing = [x for x in names if not re.search(rf"\b{x}\b", text)]
    assert not missing or len(names) == 1, missing


def by_last_name(last: str) -> object | None:
    return next((f for key, f in PUBLIC.items() if key.endswith(f".{last}")), None)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_raised_errors_are_documented(name: str) -> None:
    """Functions that raise, or call a check, have a `Raises:` section."""
    if may_raise(FUNCTIONS[name]):
        assert "Raises:" in (inspect.getdoc(FUNCTIONS[name]) or "")


def may_raise(function) -> bool:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    calls = (x.func for x in ast.walk(tree) if isinstance(x, ast.Call))
    called = {getattr(call, "id", getattr(call, "attr", "")) for call in calls}
    raises = any(isinstance(x, ast.Raise) for x in ast.walk(tree))
    return raises or any(re.match(r"_?check", name) for name in called)


@pytest.mark.parametrize("name", WITH_SOURCE)
def test_the_source_is_cited(name: str) -> None:
    assert re.search(r"arXiv \d{4}\.\d{5}", inspect.getdoc(PUBLIC[name]) or "")
