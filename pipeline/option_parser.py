"""An argument parser that goes on after a mistake, so that all mistakes in the options are reported at once.

argparse ends a program at the first one. Here each mistake is noted, its option is made to take anything, and the arguments are
parsed again, until nothing is left to note.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

# argparse's words for a value that is of no such type.
_EXPECTED = {"invalid int value: ": "expected a whole number, got ", "invalid float value: ": "expected a number, got "}


class OptionsError(ValueError):
    """All problems of a command line without a recipe; an only one is the message itself."""

    def __init__(self, problems: Sequence[str]):
        listed = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(problems[0] if len(problems) == 1 else f"{len(problems)} problems with the options:{listed}")


class Read(NamedTuple):
    """The options of a command line; the arguments that are unknown; the problems, a sentence each.

    An option that is refused, or missing, has its default.
    """

    options: argparse.Namespace
    unknown: list[str]
    problems: list[str]


class OptionParser(argparse.ArgumentParser):
    """A parser whose `read` reports all mistakes. Options are written whole, and the help keeps its lines."""

    def __init__(self, **given: Any):
        given = {"formatter_class": argparse.RawDescriptionHelpFormatter} | given
        super().__init__(allow_abbrev=False, exit_on_error=False, **given)
        self._arguments: list[str] = []

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would end the process for."""
        raise argparse.ArgumentError(None, message)

    def read(self, arguments: Sequence[str] | None) -> Read:
        """Parse as much as can be. arguments: default: the process's."""
        arguments = self._arguments = sys.argv[1:] if arguments is None else list(arguments)
        refused: list[argparse.Action] = []
        problems: list[str] = []
        while True:
            try:
                options, unknown = self._parse(arguments)
                break
            except argparse.ArgumentError as error:
                problems.append(self._sentence(error))
                at_fault = [action for action in _every_action(self) if _name_of(action) == error.argument_name]
                if any(action in refused for action in at_fault):
                    raise  # what is accepted once is not refused again: a rule of argparse that this parser does not know
                if any(isinstance(action, argparse._SubParsersAction) for action in at_fault):
                    return Read(argparse.Namespace(), [], problems)  # without its command nothing else can be read
                _require_nothing(self) if not at_fault else _accept_anything(at_fault)
                refused += at_fault
        for action in refused:
            setattr(options, action.dest, action.default)
        return Read(options, unknown, problems)

    def read_or_refuse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """Parse the arguments of a command that has no settings besides its options.

        Raises:
            OptionsError: all that is wrong with them.
        """
        options, unknown, problems = self.read(arguments)
        problems += self.unknown_options(unknown)
        if problems:
            raise OptionsError(problems)
        return options

    def unknown_options(self, arguments: Sequence[str]) -> list[str]:
        """Say what may be meant by each unknown argument; a word behind an unknown option is taken for its value."""
        before = ["", *arguments]
        values = [is_option(option) and "=" not in option and not is_option(word) for option, word in pairwise(before)]
        return [self.unknown_option(word) for word, is_value in zip(arguments, values, strict=True) if not is_value]

    def unknown_option(self, argument: str) -> str:
        """Say what may be meant by an unknown argument."""
        from pipeline.config import did_you_mean

        if not argument.startswith("-"):
            return f"{argument!r}: not expected here; {self.prog} --help says more"
        shown = [action for action in _every_action(self, self._arguments) if action.help != argparse.SUPPRESS]
        known = {option for action in shown for option in action.option_strings}
        return f"{argument}: unknown option; {did_you_mean(argument.partition('=')[0], known)}"

    def _parse(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        # Options may stand between positional arguments, which argparse cannot read where there are commands.
        if self._subparsers is None:
            return self.parse_known_intermixed_args(arguments)
        return self.parse_known_args(arguments)

    def _sentence(self, error: argparse.ArgumentError) -> str:
        if error.argument_name is None:
            return f"{error.message}; {self.prog} --help says more"
        message = error.message
        for theirs, ours in _EXPECTED.items():
            message = message.replace(theirs, ours)
        return f"{error.argument_name}: {message}"


def _every_action(parser: argparse.ArgumentParser, given: Sequence[str] | None = None) -> Iterator[argparse.Action]:
    """The options and positional arguments of a parser and of its commands, of all or of those among the given arguments."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                if given is None or name in given:
                    yield from _every_action(command)


def _name_of(action: argparse.Action) -> str:
    """The name by which argparse's errors call an action."""
    return "/".join(action.option_strings) or str(action.metavar or action.dest)


def _require_nothing(parser: argparse.ArgumentParser) -> None:
    for action in _every_action(parser):
        action.required = False


def _accept_anything(actions: Iterable[argparse.Action]) -> None:
    """Have options that were refused take any value, or none."""
    for action in actions:
        action.type = action.choices = None
        action.nargs = "*" if action.nargs == "+" else action.nargs or "?"


def is_option(argument: str) -> bool:
    """True for `--option` and `-o`; a negative number is a value."""
    return argument.startswith("-") and not argument[1:2].isdigit() and argument[1:2] != "."


def above_zero(text: str) -> float:
    """The type of an option that is a number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def at_least(least: int, most: int = 2**53) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` to `most`, by default more than anything that is counted."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        if number > most:
            raise argparse.ArgumentTypeError(f"expected a whole number of at most {most}, got {text!r}")
        return number

    return whole_number
