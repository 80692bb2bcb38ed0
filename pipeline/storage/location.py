"""Locations of data: a folder on this machine, a URL that fsspec can read, or a command that prints a file.

A folder is a `Path`, everything else a `Url`, because `Path` would turn `https://host` into `https:/host`. Both are joined with
a file name by `/`. In `pipe:COMMAND` the file name replaces `{}`. `~` is expanded wherever a path is read.
"""

import re
import shlex
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import PlainSerializer, PlainValidator

from pipeline.storage.masking import masked

_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+):(?!\\)")
# With one slash where it has been made a path.
_URL = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+):/")
PIPE = "pipe:"


class Url(str):
    """A URL, such as `https://host/folder`, `s3://bucket/folder` or `pipe:aws s3 cp s3://bucket/folder/{} -`.

    Wherever it is formatted its secrets are masked, so that no message or file can hold them; `raw` is what reads data.

    file: the name that was put into a pipe, which a masked command does not show.
    """

    __slots__ = ("file",)
    file: str

    def __new__(cls, value: str, file: str = "") -> "Url":
        url = super().__new__(cls, value)
        url.file = file
        return url

    def __str__(self) -> str:
        shown = masked(self.raw)
        return f"{shown} {self.file}" if self.file else shown

    def __repr__(self) -> str:
        return repr(str(self))

    def __format__(self, form: str) -> str:
        return format(str(self), form)

    @property
    def raw(self) -> str:
        """All of it, secrets included."""
        return str.__str__(self)

    def __truediv__(self, name: str) -> "Url":
        if self.is_pipe:
            return Url(self.replace("{}", shlex.quote(name)), name)
        scheme, host, path, query, _ = urlsplit(self)
        return Url(urlunsplit((scheme, host, f"{path.rstrip('/')}/{name}", query, "")))

    @property
    def is_pipe(self) -> bool:
        return self.startswith(PIPE)

    @property
    def scheme(self) -> str:
        return self.partition(":")[0]


Location = Path | Url
"""The location of a folder or file, local or remote."""


def parse_location(value: Any) -> Location:
    """Parse a location: a path, `file:PATH` or `file://PATH` becomes a `Path`, any other `SCHEME:…` a `Url`.

    Raises:
        ValueError: it is neither, is a file on another machine, or is a pipe without `{}`.
    """
    if isinstance(value, Path | Url):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("expected a folder, or a URL such as https://HOST/FOLDER or s3://BUCKET/FOLDER")

    # A path on this machine.
    scheme = _SCHEME.match(value)
    if scheme is None:
        return user_path(value)
    if scheme[1].lower() == "file":
        return _file_path(value)

    # A pipe or a URL.
    if value.startswith(PIPE):
        if "{}" not in value:
            raise ValueError("expected {} in a pipe: the place of a file's name, as in 'aws s3 cp s3://BUCKET/DIR/{} -'")
        return Url(value)
    if "://" not in value:
        raise ValueError(f"expected {scheme[1]}://…, file:PATH, a command behind pipe: or a folder")
    return Url(value)


def user_path(value: str | Path) -> Path:
    """Parse a path as a user writes it, `~` and `~name` included, which no shell expands behind an equals sign or in a file.

    Raises:
        ValueError: there is no such user, the path holds a NUL, or it is a URL.
    """
    if "\0" in str(value):
        raise ValueError(f"expected a path, got {str(value)!r}, which holds a NUL")
    url = _URL.match(str(value))
    if url is not None:
        # What it may hold is a secret, which a path of it (s3:/KEY:SECRET@…) would no longer show to be one.
        raise ValueError(f"expected a path on this machine, got a URL ({url[1]}://…)")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError(f"no home folder is known for the ~ of {str(value)!r}; write it out") from None


LocationSetting = Annotated[Location, PlainValidator(parse_location), PlainSerializer(str, return_type=str, when_used="json")]
"""The type of a setting that is a `Location`: parsed from a string, and written to JSON as one."""


def _file_path(value: str) -> Path:
    parts = urlsplit(value)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"file://{parts.netloc}/… is a file of another machine; expected file:///PATH")
    return user_path(unquote(parts.path))
