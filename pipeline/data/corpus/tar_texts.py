"""Texts in a tar: which of its members are documents.

A key is a member's name without its last suffix, as in `en.wikipedia.org_1.txt`; suffixes may be in capitals. A key has one
document: its .txt, or without one its .json. Members of a key need not follow each other, so all headers are read first, and
then the texts: a byte is read once, and memory holds the names of all members. Of members of one name the last one counts, as
for `tar -x`. A hard link is another name of an earlier member; a member is one document whatever names it has.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from pipeline.data.shards.tars import Member, members

LeaveOut = Callable[[Member, str], None]
"""Told of a member that is no document, and why."""


def text_members(path: Path, file: BinaryIO, leave_out: LeaveOut) -> list[tuple[Member, str]]:
    """List the members that are documents, in their order, each with its suffix, "txt" or "json".

    Args:
        path: of the tar.
        file: the same, open without a buffer.
        leave_out: called for every other file, but not for the .json of a key with a .txt.

    Raises:
        DataError: the tar is damaged.
    """
    # The last text of each key, by its suffix.
    texts: dict[str, dict[str, Member]] = {"txt": {}, "json": {}}
    for member in _files(path, file, leave_out):
        key, suffix = _key_and_suffix(member.name)
        if suffix not in texts or key.rpartition("/")[2].startswith("."):
            leave_out(member, "neither .txt nor .json" if suffix not in texts else "its name begins with a dot")
            continue
        if (earlier := texts[suffix].get(key)) is not None:
            same = "a later member has its name" if earlier.name == member.name else f"{member.name} has its key"
            leave_out(earlier, f"{same}, and is taken")
        texts[suffix][key] = member

    # The documents, of which none is taken under two names.
    found: list[tuple[Member, str]] = [(member, "txt") for member in texts["txt"].values()]
    found += [(member, "json") for member in _without_companions(texts["json"], texts["txt"], leave_out)]
    documents: dict[int, tuple[Member, str]] = {}
    for member, suffix in sorted(found, key=lambda entry: entry[0].header):
        first, _ = documents.setdefault(member.data, (member, suffix))
        if first is not member:
            leave_out(member, f"a hard link to {first.name}, which is read")
    return list(documents.values())


def _files(path: Path, file: BinaryIO, leave_out: LeaveOut) -> Iterator[Member]:
    """Iterate over the plain files and hard links, these with the data of what they link to."""
    by_name: dict[str, Member] = {}
    for member in members(path, file):
        if member.is_folder:
            continue
        if member.hard_link and (target := by_name.get(member.hard_link)) is not None:
            member = replace(member, data=target.data, size=target.size)
        elif not member.is_file:
            what = (
                f"a hard link to {member.hard_link}, which is not before it"
                if member.hard_link
                else "a link or device, no file"
            )
            leave_out(member, what)
            continue
        by_name[member.name] = member
        yield member


def _without_companions(jsons: dict[str, Member], texts: dict[str, Member], leave_out: LeaveOut) -> Iterator[Member]:
    # 0001.meta.json describes the document 0001.txt or 0001.json.
    for key, member in jsons.items():
        folder, slash, name = key.rpartition("/")
        shorter = (folder + slash + name[:end] for end, character in enumerate(name) if character == ".")
        if (owner := next((text for text in shorter if text in texts or text in jsons), None)) is not None:
            leave_out(member, f"it belongs to the key {owner}, which has a text")
        elif key not in texts:
            yield member


def _key_and_suffix(name: str) -> tuple[str, str]:
    folder, slash, name = name.rpartition("/")
    stem, dot, suffix = name.rpartition(".")
    return (folder + slash + stem, suffix.lower()) if dot else (folder + slash + name, "")
