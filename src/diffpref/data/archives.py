"""Read tar files from strangers: member by member as a stream, nothing on the disk, nothing hostile, nothing cut short.

A sample of a WebDataset is the members that stand together and share a name up to the first dot of its last part:
`000/17.chosen.png`, `000/17.rejected.png` and `000/17.json`. What follows the dot is the column.
"""

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from diffpref.data.fields import BadRow, Record
from diffpref.errors import UserError
from diffpref.files import stays_inside

MAX_BYTES = 256 * 2**20  # of an image; 64 million pixels of PNG are less
MAX_TEXT = 16 * 2**20  # of a json or txt
MAX_HEADER = 2**20  # a name or a list of attributes that is longer is an attack
BLOCK = 512
IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
KEY = "__key__"  # the column of a sample's name


def samples(file: Path, wanted: Callable[[str], bool]) -> Iterator[Record | BadRow]:
    """The samples of a tar file, plain or gzipped, in order, each as a record by column, and every refused member.

    `NAME.png` gives the column NAME, a bare `png` the column `image`, `txt` the column `prompt`, `json` every key of
    its object; KEY is the sample's name. Members of columns that are not wanted are left out unread, but for the json.

    Raises UserError where the file cannot be read or ends before its end mark.
    """
    seen: set[str] = set()
    sample: _Sample | None = None
    for member in _members(file):
        if isinstance(member, BadRow):
            yield member
            continue
        key, column = _split(member.name)
        if not column:
            yield BadRow("stray_member", ascii(member.name), bad=False)
            continue
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample.finished()
            sample = _Sample(key, BadRow("duplicate_sample", ascii(key)) if key in seen else None)
            seen.add(key)
        sample.add(member, column, wanted)
    if sample is not None:
        yield sample.finished()


@dataclass(frozen=True)
class _Member:
    name: str
    content: Callable[[], bytes]


@dataclass
class _Sample:
    key: str
    fault: BadRow | None
    record: Record = field(default_factory=dict)
    described: Record = field(default_factory=dict)
    members: set[str] = field(default_factory=set)

    def add(self, member: _Member, column: str, wanted: Callable[[str], bool]) -> None:
        if column in self.members:
            self.fault = self.fault or BadRow("duplicate_member", ascii(member.name))
        self.members.add(column)
        if self.fault:
            return
        if column == "json":
            self._describe(member)
        elif wanted(column):
            content = member.content()
            self.record[column] = content.decode("utf-8", "surrogateescape") if column == "prompt" else content

    def finished(self) -> Record | BadRow:
        return self.fault or {**self.described, **self.record, KEY: self.key}

    def _describe(self, member: _Member) -> None:
        try:
            self.described = json.loads(member.content())
        except (ValueError, RecursionError):
            self.fault = BadRow("not_json", ascii(member.name))
            return
        if not isinstance(self.described, dict):
            self.fault = BadRow("not_json", f"{member.name!a} is no object")


def _split(name: str) -> tuple[str, str]:
    """The sample's key and the column of a member; the column is "" where its name tells none."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    if not stem:  # a hidden file
        return name, ""
    column, dot, suffix = ending.rpartition(".")
    if suffix.lower() not in IMAGE_SUFFIXES:
        column = "prompt" if ending == "txt" else ending
    elif not dot:
        column = "image"
    return folder + slash + stem, column


def _members(file: Path) -> Iterator[_Member | BadRow]:
    """Every file of a tar file, or why it is none to be read."""
    with _opened(file) as stream, _errors(file):
        tar: Any = tarfile.open(fileobj=cast(Any, stream), mode="r:")  # noqa: SIM115 - what it reads is closed
        place = 0
        while (info := stream.next_of(tar)) is not None:
            if tar.offset <= place or info.size < 0:  # else it would go round for ever
                raise tarfile.ReadError(f"the size of {info.name!a} is negative")
            place = tar.offset
            tar.members.clear()  # it would remember each of a million
            if info.isdir():
                continue
            if fault := _refused(info):
                yield fault
                continue
            yield _Member(info.name.removeprefix("./"), lambda info=info: stream.content(info))
        if stream.last != bytes(BLOCK):  # what is cut short or broken would else look like the end
            raise tarfile.ReadError("it ends without an end mark, so it is cut short or damaged")
        stream.refuse_more()


def _refused(info: tarfile.TarInfo) -> BadRow | None:
    shown = ascii(info.name)[:200]
    try:
        info.name.encode("utf-8")
    except UnicodeEncodeError:
        return BadRow("unsafe_name", shown)
    if not stays_inside(info.name):
        return BadRow("unsafe_name", shown)
    if info.issym() or info.islnk():
        return BadRow("link", f"{shown} -> {ascii(info.linkname)[:200]}")
    if info.isdev():
        return BadRow("device", shown)
    if not info.isreg() or info.issparse():
        return BadRow("special_file", shown)
    if info.size > (MAX_TEXT if info.name.endswith((".json", ".txt")) else MAX_BYTES):
        return BadRow("member_too_large", f"{shown} has {info.size} bytes")
    return None


class _Stream:
    """A file that tarfile reads headers from: no more than MAX_HEADER for a member, for sizes come from strangers."""

    def __init__(self, name: Path, file: io.BufferedIOBase) -> None:
        self._name, self._file = name, file
        self._left = MAX_HEADER
        self.last = b""

    def next_of(self, tar: Any) -> tarfile.TarInfo | None:
        """The next member of the tar file that reads from here, None at its end."""
        self._left = MAX_HEADER
        return tar.next()

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise tarfile.ReadError(f"a header of over {MAX_HEADER} bytes")
        self.last = self._file.read(size)
        return self.last

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()

    def content(self, info: tarfile.TarInfo) -> bytes:
        """The bytes of a member, which must be the last one that was listed."""
        with _errors(self._name):
            self._file.seek(info.offset_data)
            data = self._file.read(info.size)
            if len(data) < info.size:
                raise tarfile.ReadError(f"it is cut short within {info.name!a}")
            return data

    def refuse_more(self) -> None:
        """Read to the end, where gzip checks its sum. Raises ReadError where something else than padding is there."""
        while rest := self._file.read(MAX_HEADER):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("something follows its end mark")


@contextmanager
def _opened(file: Path) -> Iterator[_Stream]:
    try:
        with file.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if packed else raw as unpacked:
                yield _Stream(file, unpacked)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    """What tarfile and gzip raise on foreign bytes, a dozen kinds of error, as one UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{file} is not a readable tar file: {error or type(error).__name__}") from error
