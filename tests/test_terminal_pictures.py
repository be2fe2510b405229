"""Pictures of terminals show commands that the pages print, as they print today."""

import html
import os
import re
import subprocess
import sys

import pytest

import usp_jax
from docs.make_terminal_pictures import (
    COLUMNS,
    IMAGES,
    PICTURES,
    ROOT,
    Picture,
    settled,
    typed_lines,
)
from tests.test_commands import printed, words
from train.cli import parse
from train.log.banner import banner
from usp_jax.compiled import table

EACH = pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
TEXT = re.compile(r'clip-path="url\(#\w+-line-(\d+)\)">(.*?)</text>')


def lines_of(picture: Picture) -> list[str]:
    """The lines of text in a picture."""
    found: dict[int, str] = {}
    for number, text in TEXT.findall(picture.path.read_text()):
        part = html.unescape(text).replace("\xa0", " ")
        found[int(number)] = found.get(int(number), "") + part
    return [found[number].rstrip() for number in sorted(found)]


@EACH
def test_a_page_shows_it_and_prints_its_command(picture: Picture) -> None:
    page = (ROOT / f"{picture.page}.md").read_text()
    assert re.search(rf"!\[\w.+\]\(images/{picture.path.name}\)", page)
    commands = *printed(picture.page), *printed("README")
    assert picture.command in {" ".join(command.split()) for command in commands}
    typed = typed_lines(picture.line)
    assert lines_of(picture)[: len(typed)] == typed


@EACH
def test_it_is_small_and_loads_nothing(picture: Picture) -> None:
    drawing = picture.path.read_text()
    assert len(drawing) < 60_000
    assert "http" not in drawing.replace("http://www.w3.org/2000/svg", "")
    assert max(map(len, lines_of(picture))) <= COLUMNS


def test_every_picture_is_made_by_a_command() -> None:
    names = {path.name for path in IMAGES.glob("terminal-*")}
    assert names == {picture.path.name for picture in PICTURES}


def own(name: str) -> list[str]:
    """The lines of a picture below its command."""
    picture = next(picture for picture in PICTURES if picture.name == name)
    return lines_of(picture)[len(typed_lines(picture.line)) :]


def test_the_plan_is_what_the_planner_prints() -> None:
    (picture,) = (picture for picture in PICTURES if picture.name == "plan")
    done = subprocess.run(
        [sys.executable, *picture.command.split()[1:]],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": str(COLUMNS)},
        capture_output=True,
        text=True,
        check=True,
    )
    # The last is the command, which a terminal wraps. Gaps are not in a picture.
    expected = ["".join(line.split()) for line in done.stdout.splitlines()[:-1]]
    actual = ["".join(line.split()) for line in own("plan")]
    assert actual[: len(expected) - expected.count("")] == [x for x in expected if x]


def test_a_run_begins_as_the_trainer_prints_it() -> None:
    (command,) = (x.command for x in PICTURES if x.name == "train")
    config = parse(words(command)[3:])
    mesh = usp_jax.make_mesh(**config.mesh.sizes)
    *same, _ = banner(config, mesh).splitlines()
    assert own("train")[: len(same)] == same
    text = " ".join(line.strip() for line in own("lora"))
    assert "adapters of rank 16 of q, k, v, o, gate, up, down; the others" in text


def test_the_report_has_the_columns_of_today() -> None:
    head, *_ = table([]).splitlines()
    names = [line.split() for line in own("aot")]
    assert names.count(head.split()) == 2


def test_what_is_left_on_a_terminal() -> None:
    written = (
        "one\r\n\x1b[1mtwo\x1b[0m\r\n\r⠋ busy: 0 s\r⠙ busy: 1 s\r\x1b[K"
        "\x1b[?25lbar 1\r\n\x1b[1A\x1b[2K\rbar 2\r\n\x1b[?25hend"
    )
    assert settled(written) == "one\n\x1b[1mtwo\x1b[0m\nbar 2\nend"
