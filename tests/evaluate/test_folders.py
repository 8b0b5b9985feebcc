"""Generated folders in both layouts, and everything that can be wrong with them."""

import json
from pathlib import Path

import pytest
from PIL import Image
from support.generated import make_folder, read_rows, write_rows

from diffpref.errors import UserError
from diffpref.evaluate.folders import GeneratedImage, open_image, read_folder


def picture(file: Path, size: tuple[int, int] = (8, 8)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(file)
    return file


def test_records_are_read_in_order(tmp_path: Path):
    folder = make_folder(tmp_path / "images", prompts=3, per_prompt=2)
    images, rows = read_folder(folder), read_rows(folder)
    assert [(image.file.name, image.prompt, image.index, image.seed) for image in images] == [
        (row["file_name"], row["prompt"], row["index"], row["seed"]) for row in rows
    ]
    assert open_image(images[0]).mode == "RGB"


def test_without_index_images_of_a_prompt_are_counted_and_the_seed_may_be_missing(tmp_path: Path):
    picture(tmp_path / "a.png")
    write_rows(tmp_path, [{"file_name": "a.png", "prompt": prompt} for prompt in ("x", "y", "x")])
    assert [(image.prompt, image.index, image.seed) for image in read_folder(tmp_path)] == [
        ("x", 0, None),
        ("y", 0, None),
        ("x", 1, None),
    ]


def test_dros_layout_in_the_order_of_its_numbers(tmp_path: Path):
    for name, prompt in (("000", "a cat"), ("001", "a dog"), ("002", "a cat")):
        for number in (10, 2):
            picture(tmp_path / name / f"{number}.png")
        (tmp_path / name / "caption.txt").write_text(prompt + "\n")
    (tmp_path / "scores").mkdir()
    images = read_folder(tmp_path)
    assert [image.file.relative_to(tmp_path).as_posix() for image in images[:3]] == [
        "000/2.png",
        "000/10.png",
        "001/2.png",
    ]
    assert [(image.prompt, image.index) for image in images] == [
        ("a cat", 0),
        ("a cat", 1),
        ("a dog", 0),
        ("a dog", 1),
        ("a cat", 2),
        ("a cat", 3),
    ]


def test_dros_layout_misses_nothing_silently(tmp_path: Path):
    picture(tmp_path / "000" / "0.png")
    (tmp_path / "000" / "caption.txt").write_text("a cat")
    picture(tmp_path / "001" / "0.png")
    with pytest.raises(UserError, match=r"001 has images but no caption\.txt"):
        read_folder(tmp_path)
    (tmp_path / "001" / "caption.txt").write_text("  \n")
    with pytest.raises(UserError, match=r"001/caption\.txt is empty"):
        read_folder(tmp_path)
    (tmp_path / "001" / "caption.txt").write_text("a dog")
    (tmp_path / "001" / "0.png").unlink()
    with pytest.raises(UserError, match="001 has a caption but no PNG"):
        read_folder(tmp_path)


def test_a_folder_that_is_none(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such folder: .*nowhere"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no metadata\.jsonl"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(UserError, match="lists no images"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"file_name": "a.png"}', "no prompt"),
        ('{"file_name": "a.png", "prompt": null}', "no prompt"),
        ('{"file_name": "a.png", "prompt": " "}', "no prompt"),
        ('{"file_name": "a.png", "prompt": "\\ud800"}', "the prompt is not valid Unicode"),
        ('{"prompt": "x"}', "no file_name"),
        ('{"file_name": "b.png", "prompt": "x"}', "no such image: .*b.png"),
        ('{"file_name": "../a.png", "prompt": "x"}', "file_name must stay inside"),
        ('{"file_name": "/etc/hostname", "prompt": "x"}', "file_name must stay inside"),
        ('{"file_name": "a.png", "prompt": "x", "seed": "7"}', "seed must be a whole number"),
        ('{"file_name": "a.png", "prompt": "x", "seed": true}', "seed must be a whole number"),
        ('{"file_name": "a.png", "prompt": "x", "index": -1}', "index must be a whole number"),
        ('{"file_name": "a.png", "prompt": "x", "seed": 9223372036854775808}', "seed must be a whole number"),
    ],
)
def test_a_wrong_line_is_named_in_one_line(tmp_path: Path, line: str, message: str):
    picture(tmp_path / "a.png")
    good = json.dumps({"file_name": "a.png", "prompt": "x\u2028y"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"metadata\.jsonl line 3: {message}") as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_broken_image_names_file_and_line(tmp_path: Path):
    file = picture(tmp_path / "a.png", (64, 64))
    whole = file.read_bytes()
    image = GeneratedImage(file, "x", 0, 1, "metadata.jsonl line 1")
    for content in (b"", b"no image", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"metadata\.jsonl line 1: .*a\.png is broken"):
            open_image(image)
    file.unlink()
    with pytest.raises(UserError, match=r"metadata\.jsonl line 1: cannot read .*a\.png"):
        open_image(image)


def test_transparency_is_laid_over_white(tmp_path: Path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    shown = open_image(GeneratedImage(tmp_path / "a.png", "x", 0, None))
    assert (shown.mode, shown.getpixel((0, 0))) == ("RGB", (255, 255, 255))
