"""Generated cases of bad input: each must be refused in words, or be read right."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

# Seconds that any case may take; none of them compiles anything.
LIMIT = 5.0


class Case(NamedTuple):
    """Input made by a generator.

    Attributes:
      name: what is bad about the input.
      read: reads the input, and asserts that the result is right.
      refusal: text that the error must contain; None if the input must be read.
      either: whether reading it right is as good as refusing it.
    """

    name: str
    read: Callable[[], object]
    refusal: str | None
    either: bool = False


def verdict(case: Case) -> str:
    """Returns "refused", "right", or what is wrong."""
    begun = time.monotonic()
    try:
        case.read()
        accepted = case.either or case.refusal is None
        found = "right" if accepted else "was accepted"
    except ValueError as error:
        message, found = str(error), "refused"
        if case.refusal is None or case.refusal not in message or "\n" in message:
            found = f"said {message[:200]!r}"
    # Anything else would be a traceback, such as a RecursionError or an OSError.
    except BaseException as error:
        found = f"raised {type(error).__name__}: {str(error)[:200]}"
    seconds = time.monotonic() - begun
    return found if seconds < LIMIT else f"took {seconds:.0f} s"


def check_all(cases: Iterable[Case]) -> None:
    """Reads all cases, prints how many were what, and fails if any is wrong."""
    verdicts = {case: verdict(case) for case in cases}
    counts = {
        kind: list(verdicts.values()).count(kind) for kind in ("refused", "right")
    }
    wrong = [f"{case.name}: {x}" for case, x in verdicts.items() if x not in counts]
    print(
        f"{len(verdicts)} tried, {counts['refused']} refused in words, "
        f"{counts['right']} right, {len(wrong)} wrong"
    )
    assert not wrong, "\n".join(wrong)


def command(main: Callable[[], object], *words: str) -> Callable[[], object]:
    """Returns a `Case.read` that runs a command, which must refuse its input.

    The command must exit with status 2 and print one line to stderr, or a parser's
    usage; that text is raised as ValueError.
    """

    def read() -> None:
        said, argv = io.StringIO(), sys.argv
        sys.argv = ["command", *words]
        try:
            with contextlib.redirect_stderr(said):
                with contextlib.redirect_stdout(io.StringIO()):
                    status = main()
        except SystemExit as exit_:
            status = exit_.code
        finally:
            sys.argv = argv
        message = said.getvalue().strip()
        assert status == 2, f"exit status {status}: {message[-200:]}"
        is_usage = "usage:" in message or "--help" in message or "\u256d" in message
        assert is_usage or message.startswith("error: "), message[:200]
        raise ValueError(" ".join(message.split()) if is_usage else message)

    return read
