"""Diffusion-DRO's expert folders: every image with its caption, and every fault by its reason."""

import pytest
from support.datasets import jpeg, truncated_jpeg

from diffpref.__main__ import main
from diffpref.data.dataset import PreferenceDataset
from diffpref.data.importing import ImportOptions, import_source
from diffpref.data.judging import broken_tie
from diffpref.data.schema import ImageRow
from diffpref.errors import UserError


def expert(folder, number: int, caption: str = "a caption", content: bytes | None = None, name: str | None = None):
    """One folder as tools/pickapic.py writes it."""
    place = folder / f"{number:03d}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "caption.txt").write_text(caption, encoding="utf-8")
    (place / (name or f"{number:03d}.png")).write_bytes(jpeg(number) if content is None else content)


def test_experts_become_single_images_without_a_label(tmp_path):
    for number in (10, 2, 1):
        expert(tmp_path / "in", number, f" caption {number}\n")
    expert(tmp_path / "in", 2, "caption 2", jpeg(20), "other.JPG")
    summary = import_source("dro", tmp_path / "in", tmp_path / "out")
    assert list(PreferenceDataset.open(tmp_path / "out").rows()) == [
        ImageRow("001/001", "caption 1", jpeg(1), image_id="001.png", source="dro"),
        ImageRow("002/002", "caption 2", jpeg(2), image_id="002.png", source="dro"),
        ImageRow("002/other", "caption 2", jpeg(20), image_id="other.JPG", source="dro"),
        ImageRow("010/010", "caption 10", jpeg(10), image_id="010.png", source="dro"),
    ]
    assert (summary.read, summary.kept, summary.ties, summary.format) == (4, 4, 0, "diffpref-images-1")


def test_what_is_wrong_is_counted(tmp_path):
    for number in range(60):
        expert(tmp_path / "in", number)
    expert(tmp_path / "in", 3, " ")
    expert(tmp_path / "in", 4, content=truncated_jpeg())
    (tmp_path / "in" / "005" / "005.png").unlink()
    (tmp_path / "in" / "no caption").mkdir()
    summary = import_source("dro", tmp_path / "in", tmp_path / "out")
    assert (summary.read, summary.kept) == (60, 57)
    assert summary.dropped == {"empty_caption": 1, "image_truncated": 1, "no_image": 1}
    assert [str(bad).split(" (")[0] for bad in summary.bad_rows] == [
        "003 row 0: empty_caption",
        "004 row 0: image_truncated",
        "005 row 0: no_image",
    ]


def test_nothing_to_import(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["data", "import", "dro", str(tmp_path / "empty"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"diffpref: {tmp_path / 'empty'} holds no folders with a caption.txt\n"
    with pytest.raises(UserError, match="absent does not exist"):
        import_source("dro", tmp_path / "absent", tmp_path / "out")
    expert(tmp_path / "in", 0, "")
    with pytest.raises(UserError, match=r"no image of .* is left; of 1 rows were dropped: empty_caption 1"):
        import_source("dro", tmp_path / "in", tmp_path / "out", ImportOptions(max_bad_share=1))


def test_a_tied_image_gets_a_label_that_its_id_fixes():
    labels = {broken_tie(ImageRow(str(n), "p", b"", label=0.5)).label for n in range(20)}
    assert labels == {0.0, 1.0}
    assert len({broken_tie(ImageRow("3", "p", b"", label=0.5)).label for _ in range(5)}) == 1
