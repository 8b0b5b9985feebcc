"""Judge the rows of an import, one by one: filters, images, duplicates, ties; every row left out gets its reason."""

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace

from diffpref.data import images
from diffpref.data.groups import as_images, pairs_from
from diffpref.data.import_options import ImportOptions, Ties
from diffpref.data.schema import SIDES, Dropped, Found, Group, ImageRow, PairRow, Row, exchanged

Item = Found | Dropped | Group


@dataclass(frozen=True)
class Examined:
    """A row and what its images say. `judged` tells whether they were looked at; `content` names prompt and images."""

    row: Found | Dropped
    judged: bool
    content: bytes = b""


def examine(item: Item, options: ImportOptions) -> list[Examined]:
    """The rows that an item of a source gives, filtered and with their images decoded: what threads share.

    Each image of a group is decoded once.
    """
    looked: dict[bytes, int | images.BadImage] = {}
    return [_examined(row, options, looked) for row in _rows_of(item, options)]


def _rows_of(item: Item, options: ImportOptions) -> list[Found | Dropped]:
    rows = pairs_from(item, options.pairing or "all", options.min_margin) if isinstance(item, Group) else [item]
    rows = [_filtered(row, options) for row in rows]
    if options.rules == "dro":
        return [each for row in rows for each in ([row] if isinstance(row, Dropped) else as_images(row))]
    return rows


def _filtered(row: Found | Dropped, options: ImportOptions) -> Found | Dropped:
    """The row, or the reason why what the source says of it rules it out; no image is decoded for this."""
    if isinstance(row, Dropped):
        return row
    left_out = Dropped(row.file, row.row, "", bad=False)
    models = [name or "" for name in models_of(row.record)]
    if options.generator is not None and any(options.generator not in name for name in models):
        return replace(left_out, reason="other_generator", detail="\n".join(filter(None, models)))
    if options.min_agreement > 0:
        if row.agreement is None:
            return replace(left_out, reason="no_agreement")
        if row.agreement < options.min_agreement:
            return replace(left_out, reason="low_agreement")
    if options.rules == "dcpo" and isinstance(row.record, PairRow):
        captions = (row.record.chosen_prompt, row.record.rejected_prompt)
        if not all(caption and caption.strip() for caption in captions):
            return Dropped(row.file, row.row, "no_caption", "DCPO needs a caption for each image")
    return row


def _examined(row: Found | Dropped, options: ImportOptions, looked: dict[bytes, int | images.BadImage]) -> Examined:
    if isinstance(row, Dropped):
        return Examined(row, row.bad)
    sides = SIDES["pairs" if isinstance(row.record, PairRow) else "images"]
    least = options.min_side
    for side in sides:
        data = getattr(row.record, side)
        if data not in looked:
            looked[data] = _look(data)
        found = looked[data]
        if isinstance(found, images.BadImage):
            name = getattr(row.record, f"{side}_id") if not data else None  # a file of this name may be missing
            which = f"the {side} image{f' {name}' if name else ''}: " if len(sides) > 1 else ""
            return Examined(Dropped(row.file, row.row, f"image_{found.reason}", f"{which}{found}"), True)
        if found < least:
            return Examined(Dropped(row.file, row.row, "small_image", bad=False), True)
    return Examined(row, True, content_of(row.record) if options.unique else b"")


def _look(data: bytes) -> int | images.BadImage:
    """The least side of an image in pixels, or what is wrong with it."""
    try:
        return min(images.decode(data).size)
    except images.BadImage as error:
        return error


def models_of(row: Row) -> tuple[str | None, ...]:
    """The generators of a row's images."""
    return (row.chosen_model, row.rejected_model) if isinstance(row, PairRow) else (row.image_model,)


def content_of(row: Row) -> bytes:
    """What two duplicates have in common: the prompt, and each image's SHA-256 sum with its own caption, in any order.

    So a pair that was judged twice is a duplicate, whoever won.
    """
    if isinstance(row, ImageRow):
        sides = [(row.image, row.image_prompt)]
    else:
        sides = [(row.chosen, row.chosen_prompt), (row.rejected, row.rejected_prompt)]
    parts = sorted((hashlib.sha256(data).hexdigest(), caption or "") for data, caption in sides)
    return hashlib.sha256(repr((row.prompt, parts)).encode("utf-8", "surrogatepass")).digest()


class Seen:
    """What was kept before, so that an id, and if asked for a content, is kept once: 16 bytes a row."""

    def __init__(self, entries: Iterable[int] = ()) -> None:
        self.entries = array("Q", entries)  # id, content, id, content, ...
        self._ids, self._contents = set(self.entries[::2]), set(self.entries[1::2])

    def duplicate(self, row: Row, content: bytes) -> str | None:
        """The reason why the row repeats one that was kept, or None."""
        if _short(row.id.encode("utf-8", "surrogatepass")) in self._ids:
            return "duplicate_id"
        if content and _short(content) in self._contents:
            return "duplicate_pair" if isinstance(row, PairRow) else "duplicate_image"
        return None

    def add(self, row: Row, content: bytes) -> None:
        """Remember a row that is kept."""
        entry = _short(row.id.encode("utf-8", "surrogatepass")), _short(content) if content else 0
        self._ids.add(entry[0])
        self._contents.add(entry[1])
        self.entries.extend(entry)


def _short(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def without_tie(row: Found, ties: Ties) -> Found | Dropped:
    """A tie as the option wants it: kept, dropped, decided by a coin that its id fixes, or won by the first image."""
    if ties == "drop":
        return Dropped(row.file, row.row, "tie", bad=False)
    if ties == "random":
        return replace(row, record=broken_tie(row.record))
    if ties == "first":
        return replace(
            row,
            record=replace(exchanged(row.record), label=1.0)
            if row.turned and isinstance(row.record, PairRow)
            else replace(row.record, label=1.0),
        )
    return row


def broken_tie(row: Row) -> Row:
    """The tie decided by a coin that its id fixes: a pair's images stand or change places, an image is liked or not."""
    if hashlib.sha256(row.id.encode()).digest()[0] % 2 == 0:
        return replace(row, label=1.0)
    return replace(exchanged(row), label=1.0) if isinstance(row, PairRow) else replace(row, label=0.0)
