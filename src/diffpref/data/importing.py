"""Import a published dataset: read a source, keep the rows whose images decode, write the normal form."""

import hashlib
import importlib
import itertools
import json
import pkgutil
import sys
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

from diffpref import __version__
from diffpref.data import sources
from diffpref.data.import_options import ImportOptions
from diffpref.data.inputs import Input, find_input
from diffpref.data.judging import Examined, Item, Seen, examine, without_tie
from diffpref.data.naming import settled
from diffpref.data.resuming import Partial, mend, resumable_folder
from diffpref.data.schema import FORMATS, DatasetSummary, Dropped, Found, Kind
from diffpref.data.splitting import split_of_prompt
from diffpref.data.standing import made_before
from diffpref.data.tally import Tally
from diffpref.data.threads import map_in_order
from diffpref.data.writing import SplitsWriter
from diffpref.errors import UserError, nearest
from diffpref.files import flush
from diffpref.progress import Bar


@runtime_checkable
class Source(Protocol):
    """What a module in `data/sources` offers; the package's docstring tells what it may offer besides."""

    KIND: Literal["pairs", "images", "groups"]  # once it is settled

    def count(self, path: Path, split: str) -> int: ...
    def read(self, path: Path, split: str) -> Iterator[Item]: ...


@dataclass(frozen=True)
class Place:
    """A place in the source: so many items of this part have been read, and all parts before it."""

    part: int = 0
    items: int = 0


def import_source(source: str, input: Path | str, output: Path, options: ImportOptions | None = None) -> DatasetSummary:
    """Write a published dataset to the folder `output` in the normal form: of a local path, or a dataset id of the hub.

    Killed and called again with the same arguments, it goes on after the last finished shards, and the output is that
    of one undisturbed call. Raises UserError, and leaves nothing at `output`, where the source, the input, the options
    or the output will not do, where more than `max_bad_share` of the judged rows are bad, or where no row is left.
    """
    options = options or ImportOptions()
    options.check()
    module = find_source(source)
    given = find_input(str(input), options.split, getattr(module, "SHARDS", ()), options.revision)
    if given.path and given.path.resolve().is_relative_to(output.resolve()):
        raise UserError(f"the output {output} would replace the input {input}: choose another folder")
    path = given.path or (Path() if module.KIND else given.parts[0]())  # of a dataset id, its first file tells
    reader = cast(Source, settled(source, module, path, options.split, options.columns))
    _refuse_unused(source, reader, options)
    if left_out := getattr(reader, "LEFT_OUT", ()):
        print(f"diffpref: warning: columns that are left out: {', '.join(left_out)}", file=sys.stderr)
    key = _key(source, given, options)
    mend(output, key)
    if not options.overwrite and (whole := made_before(output, _told(source, given, options), given.path)):
        return whole
    with resumable_folder(output, key, options.overwrite) as folder:
        summary = _Import(source, reader, given, options, folder).run()
        summary.write(folder.data)
    if summary.options["ties"] == "keep" and summary.ties == summary.kept:
        every = f"every {summary.format.split('-')[1].removesuffix('s')} in {output}"
        print(f"diffpref: warning: {every} is a tie; there is no preference to train on", file=sys.stderr)
    return summary


def find_source(name: str) -> Any:
    """The source module of that name. Raises UserError with the nearest name where there is none."""
    known = {module.name.replace("_", "-"): module.name for module in pkgutil.iter_modules(sources.__path__)}
    name = name.replace("_", "-")
    if name not in known:
        raise UserError(f"unknown source {name!r}: {nearest(name, known)}")
    return importlib.import_module(f"diffpref.data.sources.{known[name]}")


class _Import:
    """One import on its way: what was read, kept and written so far."""

    def __init__(self, source: str, reader: Source, given: Input, options: ImportOptions, folder: Partial) -> None:
        self.source, self.reader, self.given, self.options, self.folder = source, reader, given, options, folder
        single = reader.KIND == "images" or options.rules == "dro"
        self.kind: Kind = "images" if single else "pairs"
        self.scores: tuple[str, ...] = tuple(getattr(reader, "SCORES", ()))
        journal = folder.journal if folder.journal and _finished(folder.journal["shards"], folder.data) else None
        self.place = Place(**journal["place"]) if journal else Place()
        self.tally = Tally.of_record(journal["tally"]) if journal else Tally(options.max_bad_share)
        self.shards = journal["shards"] if journal else dict.fromkeys(options.splits or [options.split], 0)
        self.seen = _seen(folder, journal["seen"] if journal else 0)
        self.saved = len(self.seen.entries)

    def run(self) -> DatasetSummary:
        """Read what is left to read. Raises UserError as `import_source`."""
        _remove_unfinished(self.folder.data, self.shards)
        name, options = self.given.name, self.options
        done, total, unit = self.place.part, len(self.given.parts), "shards"
        if self.given.path:
            done, total, unit = self.place.items, self.reader.count(self.given.path, options.split), self.reader.KIND
            if not total:
                raise UserError(f"{name} is empty: it holds no rows")
            if self.reader.KIND != "groups" and options.rules != "dro":  # where each item is one row
                self.tally.total = total
        look = partial(_look, options=options)
        with (
            SplitsWriter(self.folder.data, self.kind, self.shards, options.shard_rows, self.scores) as writer,
            Bar(f"import {self.source}", total, unit, done=done) as bar,
        ):
            for place, rows in map_in_order(look, self._items()):
                for row in rows:
                    self._take(row, writer)
                bar.advance(place.part - self.place.part if unit == "shards" else 1)
                self.place = place
                if writer.advance():
                    self._commit(writer)
            self._commit(writer)
            if unit == "shards":
                bar.advance(total - self.place.part)
        self._refuse_unknown_generator()
        self.tally.finish(name, self.kind.removesuffix("s"))
        return self._summary()

    def _items(self) -> Iterator[tuple[Place, Item]]:
        """What is left of the source, each item with the place after it."""
        begin = self.place
        for part in range(begin.part, len(self.given.parts)):
            start = begin.items if part == begin.part else 0
            path = self.given.parts[part]()
            if not self.given.path:
                self.reader.count(path, self.options.split)  # it refuses at once what cannot be read
            for number, item in enumerate(_read_from(self.reader, path, self.options.split, start), start + 1):
                yield Place(part, number), item

    def _take(self, examined: Examined, writer: SplitsWriter) -> None:
        row = examined.row
        if isinstance(row, Found):
            if reason := self.seen.duplicate(row.record, examined.content):
                row = Dropped(row.file, row.row, reason, row.record.id, bad=reason == "duplicate_id")
            elif row.record.label == 0.5:
                self.tally.ties += 1
                row = without_tie(row, self.options.what_of_ties)
        self.tally.count(row, examined.judged)
        if isinstance(row, Found):
            self.seen.add(row.record, examined.content)
            shares = self.options.splits
            split = split_of_prompt(row.record.prompt, shares) if shares else self.options.split
            self.tally.splits[split] += 1
            writer.write(split, row.record)

    def _commit(self, writer: SplitsWriter) -> None:
        """Bring all that was read onto the disk, and say so."""
        shards = writer.end_round()
        with (self.folder.folder / "seen").open("ab") as file:
            self.seen.entries[self.saved :].tofile(file)
        flush(self.folder.folder / "seen")
        self.saved = len(self.seen.entries)
        record = {"place": asdict(self.place), "tally": self.tally.record(), "shards": shards, "seen": self.saved}
        self.folder.commit(record)

    def _refuse_unknown_generator(self) -> None:
        """Raises UserError where `generator` is the reason that nothing is left."""
        text = self.options.generator
        if text is None or self.tally.kept or not self.tally.dropped["other_generator"]:
            return
        known = self.tally.generators
        advice = nearest(text, known) if known else "it names no generators"
        raise UserError(f"--generator: in no row of {self.given.name} does each contain {text!r}: {advice}")

    def _summary(self) -> DatasetSummary:
        tally = self.tally
        return DatasetSummary(
            **_told(self.source, self.given, self.options),
            read=tally.read,
            kept=tally.kept,
            ties=tally.ties,
            dropped=dict(tally.dropped.most_common()),
            bad_rows=tally.named,
            splits={name: tally.splits[name] for name in self.options.splits},
            format=FORMATS[self.kind],
        )


def _read_from(reader: Source, path: Path, split: str, start: int) -> Iterator[Item]:
    """The items of a source without the first `start`, which a source that cannot skip them reads once more."""
    if skipping := getattr(reader, "read_from", None):
        return skipping(path, split, start)
    return itertools.islice(reader.read(path, split), start, None)


def _look(placed: tuple[Place, Item], options: ImportOptions) -> tuple[Place, list[Examined]]:
    place, item = placed
    return place, examine(item, options)


def _refuse_unused(source: str, reader: Source, options: ImportOptions) -> None:
    """Raises UserError for an option that would change nothing."""
    if reader.KIND != "groups":
        for name in ("pairing", "min_margin"):
            if getattr(options, name):
                raise UserError(f"--{name.replace('_', '-')} is of ranked groups, and {source} holds {reader.KIND}")
    if reader.KIND == "images" and options.rules:
        raise UserError(f"--rules {options.rules} is about pairs, and {source} holds single images")


def _told(source: str, given: Input, options: ImportOptions) -> dict[str, Any]:
    """What `dataset.json` says of the work itself."""
    how = options.record() | ({"revision": given.revision} if given.revision else {})
    return {"source": source, "input": given.name, "split": options.split, "options": how}


def _key(source: str, given: Input, options: ImportOptions) -> str:
    """Names this work: what is read, and how."""
    how = [options.record(), options.split, options.shard_rows]
    work = json.dumps([__version__, source, given.name, given.state, how])
    return f"import-{hashlib.sha256(work.encode()).hexdigest()[:12]}"


def _seen(folder: Partial, count: int) -> Seen:
    """What was kept until the last commit, `count` numbers; what a killed import wrote after it is cut off."""
    file = folder.folder / "seen"
    entries = array("Q")
    with file.open("ab+") as opened:
        opened.truncate(count * entries.itemsize)
        opened.seek(0)
        entries.fromfile(opened, count)
    return Seen(entries)


def _finished(shards: dict[str, int], data: Path) -> bool:
    """Whether all shards that a journal tells of are there; someone may have tidied up."""
    return _names(shards) <= {file.name for file in data.iterdir()}


def _names(shards: dict[str, int]) -> set[str]:
    return {f"{split}-{number:05d}.parquet" for split, count in shards.items() for number in range(count)}


def _remove_unfinished(data: Path, shards: dict[str, int]) -> None:
    """Remove what the journal does not tell of."""
    for file in data.iterdir():
        if file.name not in _names(shards):
            file.unlink()
