"""The options that commands share: a recipe with its overrides, paths, and figures as JSON.

Settings load pydantic, which takes a while, so the imports are inside the functions: a signal handler and a first line come
before.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.option_parser import OptionParser, Read, is_option
from pipeline.storage.location import user_path
from pipeline.storage.whole_file import naming

if TYPE_CHECKING:
    from pipeline.config import Settings


def path_argument(text: str) -> Path:
    """Parse an option that is a path; `~` is expanded, which shells leave alone behind `=` and in quotes."""
    try:
        return user_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def recipe_parser(name: str, description: str | None, default_recipe: Path) -> OptionParser:
    """The options of every command that reads a recipe and a DeepSpeed JSON; a command adds its own."""
    parser = OptionParser(prog=name, description=description)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--deepspeed", type=path_argument, required=True, metavar="JSON", help="DeepSpeed's settings, as in ds_configs/"
    )
    parser.add_argument(
        "--config", type=path_argument, default=default_recipe, metavar="YAML", help="recipe (default: the demo)"
    )
    return parser


def job_parser(name: str, description: str | None, default_recipe: Path) -> OptionParser:
    """The options of every command that runs on all ranks of a job."""
    parser = recipe_parser(name, description, default_recipe)
    parser.add_argument("--run-dir", type=path_argument, metavar="DIR", help="default: runs/ and the recipe's run.name")
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--print-run-dir", action="store_true", help="print the name of the run directory and stop")
    # Appended by the deepspeed launcher; LOCAL_RANK in the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def read_options(parser: OptionParser, arguments: Sequence[str]) -> Read:
    """Parse the options, overrides included; the unknown ones are `--option` or `--option=value`."""
    options, left, problems = parser.read(arguments)
    # argparse also returns the overrides that follow an unknown option as unknown.
    options.overrides += [argument for argument in left if not is_option(argument)]

    # What follows an unknown option and is no override is its value; the same option may be there again.
    unknown, place = [], -1
    for option in filter(is_option, left):
        place = list(arguments).index(option, place + 1)
        after = arguments[place + 1 :][:1]
        if "=" not in option and after and "=" not in after[0] and after[0] in options.overrides:
            options.overrides.remove(after[0])
            option = f"{option}={after[0]}"
        unknown.append(option)
    return Read(options, unknown, problems)


def read_recipe(parser: OptionParser, read: Read) -> tuple["Settings", list[str]]:
    """Read the settings that the options ask for; returns them with all problems, one sentence each, those of the options
    first.

    A refused setting keeps its default.
    """
    from pipeline.recipe import read_settings

    is_named = not any(problem.startswith("--config: ") for problem in read.problems)
    settings, found = read_settings(read.options.config if is_named else None, read.options.overrides, is_known=is_named)
    return settings, [*read.problems, *(_unknown(option, parser) for option in read.unknown), *found]


def _unknown(option: str, parser: OptionParser) -> str:
    from pipeline.recipe import meaning_of, settings_meant

    name, _, value = option.partition("=")
    word = name.lstrip("-")
    if settings_meant(word):
        return f"{option}: unknown option; settings have no dashes: {meaning_of(word, value or 'VALUE')}"
    meaning = meaning_of(word)
    return f"{option}: unknown option; {meaning}" if meaning else parser.unknown_option(option)


def write_json(path: Path, figures: Any) -> None:
    """Write a command's figures as it prints them, at full precision."""
    with naming(path):
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def json_problems(path: Path | None) -> list[str]:
    """List what speaks against writing figures to the --json path, before they are computed."""
    return output_problems("--json", path)


def output_problems(option: str, path: Path | None) -> list[str]:
    """List what speaks against writing a file to an option's path."""
    if path is None:
        return []
    if path.is_dir():
        return [f"{option}: {path} is a directory; expected a file to write"]
    if not path.parent.is_dir():
        return [f"{option}: {path.parent} is not a directory; make it first, or write elsewhere"]
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return [f"{option}: {path} cannot be written to; choose another file"]
    return []
