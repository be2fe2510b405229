"""Shows on the API pages the options that `**options: Unpack[...]` stands for.

A griffe extension (mkdocs.yml): signatures and descriptions are `usp_attention`'s.
"""

import ast
from collections.abc import Iterator
from typing import Any

import griffe

SOURCE = "attention.usp_attention"
LISTS = ("StaticOptions", "Options")
# The file with a function's table of refused options, where it is not its own.
TABLES = {"nn.layer": "nn.adapter"}


class AttentionOptions(griffe.Extension):
    """Replaces the `**options` of the functions of usp_jax."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        if pkg.name != "usp_jax":
            return
        source = pkg[SOURCE]
        described = {item.name: item for item in _parameters(source)}
        for function in _functions(pkg):
            names = _options(pkg, function)
            if not names:
                continue
            del function.parameters["options"]
            items = _parameters(function)
            own = {item.name for item in items}
            for name in [name for name in names if name not in _refused(pkg, function)]:
                if name not in function.parameters:
                    function.parameters.add(source.parameters[name])
                if name not in own:
                    items.append(described[name])


def _functions(parent: griffe.Object) -> Iterator[griffe.Function]:
    for member in parent.members.values():
        if member.is_alias:
            continue
        if member.is_function:
            yield member
        elif member.is_module or member.is_class:
            yield from _functions(member)


def _options(pkg: griffe.Module, function: griffe.Function) -> list[str]:
    """The names of a function's `**options`, in the list's order."""
    if "options" not in function.parameters:
        return []
    annotation = str(function.parameters["options"].annotation)
    lists = {f"Unpack[{name}]": name for name in LISTS}
    if annotation not in lists:
        return []
    members = LISTS[: LISTS.index(lists[annotation]) + 1]
    return [name for part in members for name in pkg[f"options.{part}"].attributes]


def _refused(pkg: griffe.Module, function: griffe.Function) -> set[str]:
    """The options that a function does not take."""
    file = function.module.path.removeprefix(f"{pkg.name}.")
    module = pkg[TABLES.get(file, file)]
    if "REFUSED" not in module.members:
        return set()
    return {ast.literal_eval(str(key)) for key in module["REFUSED"].value.keys}


def _parameters(function: griffe.Function) -> list[griffe.DocstringParameter]:
    """The described parameters, a list that may be added to."""
    if function.docstring is None:
        return []
    sections = function.docstring.parsed
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.parameters:
            return section.value
    section = griffe.DocstringSectionParameters([])
    sections.insert(1, section)
    return section.value
