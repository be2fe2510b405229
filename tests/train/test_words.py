"""What commands print reads well in a terminal of 80 columns."""

import dataclasses
import typing
from collections.abc import Iterator

import docstring_parser
import pytest

from train.cli import parse
from train.config import Config
from train.evaluate import Evaluate
from train.generate import Generate
from train.tokenize import Tokenize
from train.words import counted, printable


def sections(kind: type) -> Iterator[type]:
    """A dataclass, the dataclasses of its fields, and those they inherit from."""
    yield from (x for x in kind.__mro__ if dataclasses.is_dataclass(x))
    for hint in typing.get_type_hints(kind).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from sections(part)


@pytest.mark.parametrize("command", [Config, Generate, Evaluate, Tokenize])
def test_help_texts_are_filled(command: type) -> None:
    """Tyro keeps the break before a line that does not begin with a letter."""
    found = list(sections(command))
    assert found
    for kind in found:
        for option in docstring_parser.parse(kind.__doc__ or "").params:
            for line in (option.description or "").splitlines()[1:]:
                assert line[:1].isalpha(), (kind.__name__, option.arg_name, line)


def test_the_list_of_models_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    head = capsys.readouterr().out.partition("\noptions, with")[0]
    assert "gpt-oss-120b" in head and "  tiny: A model" in head
    assert all(len(line) <= 80 for line in head.splitlines())


def test_control_characters_are_replaced() -> None:
    assert printable("a\n\tb\x1b[2J\rc\x85é") == "a\n\tb\ufffd[2J\ufffdc\ufffdé"


def test_one_thing_is_not_counted_as_many() -> None:
    found = [counted(number, "shard") for number in (0, 1, 1200)]
    assert found == ["0 shards", "1 shard", "1,200 shards"]
