"""Pick-Double-Caption (DCPO): Pick-a-Pic's pairs with a caption for each image.

`caption_0` and `caption_1` belong to the images 0 and 1. A perturbed caption of the image that lost may stand in a
column whose name differs from copy to copy; the user names it (`--columns rejected_caption=NAME`), and it takes the
place of the loser's caption.
"""

from collections.abc import Iterator
from pathlib import Path

from diffpref.data import tables
from diffpref.data.fields import BadRow, Columns, Record, text, winner
from diffpref.data.schema import Dropped, Found, Kind, PairRow

KIND: Kind = "pairs"
SHARDS = (".parquet", ".tar")
COLUMNS = Columns(
    {"jpg_0": "image", "jpg_1": "image", "label_0": "number", "caption_0": "text", "caption_1": "text"},
    {
        "caption": "text",
        "rejected_caption": "text",
        "label_1": "number",
        "has_label": "flag",
        "image_0_uid": "name",
        "image_1_uid": "name",
        "model_0": "name",
        "model_1": "name",
        "ranking_id": "name",
        "user_id": "name",
    },
)


def count(path: Path, split: str, names: tables.Names | None = None) -> int:
    """The number of rows. Raises UserError where a file is broken or lacks a column."""
    return tables.count(path, split, COLUMNS, names)


def read(path: Path, split: str, names: tables.Names | None = None) -> Iterator[Found | Dropped]:
    """Every row as a pair with two captions, or why it is none. Raises UserError as `count`."""
    return tables.read(path, split, COLUMNS, _pair, names)


def _pair(record: Record, name: str) -> PairRow:
    if record.get("has_label") is False:
        raise BadRow("no_label", bad=False)
    label, other = winner(record, "label_0"), record.get("label_1")
    if other is not None and label + other != 1:
        raise BadRow("labels_disagree", f"label_0 is {label:g} and label_1 is {other:g}")
    captions = [text(record, "caption_0"), text(record, "caption_1")]
    chosen, rejected = (1, 0) if label == 0 else (0, 1)
    if "rejected_caption" in record:
        captions[rejected] = text(record, "rejected_caption")
    return PairRow(
        id=name,
        prompt=text(record, "caption") if "caption" in record else captions[chosen],
        chosen=record[f"jpg_{chosen}"] or b"",
        rejected=record[f"jpg_{rejected}"] or b"",
        chosen_prompt=captions[chosen],
        rejected_prompt=captions[rejected],
        label=max(label, 1 - label),
        chosen_id=record.get(f"image_{chosen}_uid"),
        rejected_id=record.get(f"image_{rejected}_uid"),
        chosen_model=record.get(f"model_{chosen}"),
        rejected_model=record.get(f"model_{rejected}"),
        source="pick-double-caption",
        group_id=record.get("ranking_id"),
        annotator_id=record.get("user_id"),
    )
