"""Secrets in URLs and commands, masked in all that is written or printed.

A location may hold a password (`s3://KEY:SECRET@bucket`), a signature in its query (`?X-Amz-Signature=…`, `?sig=…`) or a token
in the command of a pipe. Which parameter of a query is a secret nobody can list, so the values of all are masked; of a command
the program's name remains. What a location gives is known by content, so a masked one is enough to tell what was meant. Tokens
and keys of well-known form, headers and variables that hold one are masked wherever they stand, because servers and programs
repeat them in what they answer.

What is masked already stays as it is.
"""

import re
from typing import Any

MASK = "***"

# All that may stand before an @ in the authority; behind a colon any character, since keys of S3 hold slashes. In a text a URL
# ends at a space or a quotation mark, and a command at the end of its line; a location by itself may hold all of these.
_USER = re.compile(r"(://)(?:[^/?#:]*:.*|[^/?#:]*)@", re.DOTALL)
_QUERY = re.compile(r"(://[^?#]*)([?#].*)", re.DOTALL)
_PIPE = re.compile(r"(?<!\w)pipe:(?=\S)([^\s'\"]*)(.*)", re.DOTALL)
_USER_IN_TEXT = re.compile(r"(://)(?:[^\s/?#:'\"<>]*:[^\s'\"<>]*|[^\s/?#:'\"<>]*)@")
_QUERY_IN_TEXT = re.compile(r"(://[^\s?#'\"<>]*)([?#][^\s'\"<>]*)")
_PIPE_IN_TEXT = re.compile(_PIPE.pattern)
_VALUE = re.compile(r"([?#&;][^=&;?#]+=)(?!\*\*\*)[^&;#]*")
_WITHOUT_NAME = re.compile(r"([?#&;])(?!\*\*\*)[^=&;?#]+(?![^&;?#]*=)(?=[&;#]|$)")
_PROGRAM = re.compile(r"[\w./+-]+")
# Hugging Face, GitHub, GitLab, Slack, AWS, Google, OpenAI's form, JSON web tokens; headers; variables of the environment.
_TOKEN = re.compile(
    r"(?<!\w)(?:hf_|gh[oprsu]_|github_pat_|glpat-|xox[abeoprs]-|A[KS]IA(?=[A-Z0-9]{16})|AIza|ya29\.|sk-(?=\w{16})|"
    r"eyJ(?=\w{16}))[\w.-]{8,}"
)
_HEADER = re.compile(r"(?i)(?<!\w)(authorization: *(?:(?:basic|bearer|digest|token) +)?+|(?-i:Bearer +))(?!\*\*\*)[^\s'\"]+")
_VARIABLE = re.compile(r"(?<!\w)([A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|KEY)[A-Z0-9_]*=)(?!\*\*\*)[^\s'\"]+")
_LEAST_WORD = 4


def masked(value: str) -> str:
    """Mask the secrets of a location, or of an argument or a line of a recipe that may hold one: rather too much than too
    little."""
    value = _USER.sub(rf"\1{MASK}@", _masked_tokens(_PIPE.sub(_masked_pipe, value)))
    return _QUERY.sub(lambda found: found[1] + _masked_query(found[2]), value)


def masked_text(text: str) -> str:
    """Mask the secrets of all URLs and pipes in a message. A pipe's command is taken to reach to the end of its line."""
    text = _USER_IN_TEXT.sub(rf"\1{MASK}@", _masked_tokens(_PIPE_IN_TEXT.sub(_masked_pipe, text)))
    return _QUERY_IN_TEXT.sub(lambda found: found[1] + _masked_query(found[2]), text)


def masked_answer(text: str, command: str, file: str) -> str:
    """Mask in what a command has said its own words, such as a password that it took for a host: all but the program's name and
    those that name the file that it was to give."""
    program, *words = re.split(r"[\s'\"=;]+", command.strip())
    unnamed = (word for word in set(words) if len(word) >= _LEAST_WORD and word != program and not (file and file in word))
    for word in sorted(unnamed, key=len, reverse=True):
        text = text.replace(word, MASK)
    return masked_text(text)


def masked_values(value: Any) -> Any:
    """Mask the texts in a JSON value."""
    if isinstance(value, str):
        return masked(value)
    if isinstance(value, dict):
        return {key: masked_values(each) for key, each in value.items()}
    return [masked_values(each) for each in value] if isinstance(value, list | tuple) else value


def _masked_tokens(text: str) -> str:
    return _VARIABLE.sub(rf"\1{MASK}", _HEADER.sub(rf"\1{MASK}", _TOKEN.sub(MASK, text)))


def _masked_query(query: str) -> str:
    return _WITHOUT_NAME.sub(rf"\1{MASK}", _VALUE.sub(rf"\1{MASK}", query))


def _masked_pipe(found: re.Match[str]) -> str:
    program, rest = found[1], found[2]
    if rest.startswith(f" {MASK}") or program.startswith(MASK):
        return found[0]
    quote = rest[-1] if rest[-1:] in ("'", '"') else ""
    if rest == quote and _PROGRAM.fullmatch(program):
        return found[0]  # a command without arguments
    return f"pipe:{program if _PROGRAM.fullmatch(program) else MASK} {MASK}{quote}"
