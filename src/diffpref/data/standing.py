"""Tell that the very same work stands finished at its output, so that a command called again has nothing to do."""

import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diffpref import __version__
from diffpref.data.inputs import files_of
from diffpref.data.schema import DATASET_FILE, DatasetSummary, Dropped, read_dataset_file


def made_before(output: Path, wanted: dict[str, Any], input: Path | None) -> DatasetSummary | None:
    """The summary of what stands at `output` where it is what is wanted, and whole; a line on stderr says so.

    wanted: what its `dataset.json` must say, by key. input: what it was made of, no file of which may be younger; None
    where `wanted` names a commit. None where another dataset stands there, or none, or rows of it are missing.
    """
    if not output.is_dir() or not (described := read_dataset_file(output)):
        return None
    wanted = json.loads(json.dumps(wanted | {"diffpref_version": __version__}))
    if any(described.get(key) != value for key, value in wanted.items()):
        return None
    finished = (output / DATASET_FILE).stat().st_mtime_ns
    if input is not None and any(file.stat().st_mtime_ns > finished for file in files_of(input)):
        return None
    if not _has_its_rows(output, described):
        return None
    print(f"diffpref: {output} is whole already: nothing to do", file=sys.stderr)
    known: dict[str, Any] = {
        each.name: described[each.name] for each in fields(DatasetSummary) if each.name in described
    }
    known["bad_rows"] = [Dropped(**row) for row in described["bad_rows"]]
    return DatasetSummary(**known)


def _has_its_rows(output: Path, described: dict[str, Any]) -> bool:
    """Whether the shards hold all rows; of an export that is no parquet, whether there is anything."""
    if described["options"].get("form") in ("folder", "webdataset"):
        return any(file.name != DATASET_FILE for file in output.iterdir())
    try:
        return sum(pq.read_metadata(file).num_rows for file in output.glob("*.parquet")) == described["kept"]
    except (OSError, pa.ArrowException):
        return False
