"""Tar files from strangers: samples in order, nothing hostile, nothing cut short, nothing on the disk."""

import io
import json
import tarfile
import tracemalloc
from random import Random

import pytest
from support.datasets import pair_sample, special, write_tar

from diffpref.data import archives
from diffpref.data.archives import KEY, samples
from diffpref.data.fields import BadRow
from diffpref.errors import UserError


def read(file, wanted=("chosen", "rejected", "image", "prompt")) -> list:
    return list(samples(file, wanted.__contains__))


def faults(file) -> list[tuple[str, bool]]:
    return [(each.reason, each.bad) for each in read(file) if isinstance(each, BadRow)]


def test_samples_are_members_that_share_a_name(tmp_path):
    members = [
        ("a/0.1.json", b'{"prompt": "p", "n": 1}'),  # the key ends at the first dot
        ("a/0.chosen.png", b"C"),
        ("a/0.rejected.JPG", b"R"),
        ("b/0.chosen", b"other"),
        ("b/0.notes.txt", b"left out"),
        ("./1.png", b"I"),
        ("./1.txt", "grün".encode()),
    ]
    assert read(write_tar(tmp_path / "a.tar", members)) == [
        {"chosen": b"C", "rejected": b"R", KEY: "a/0"},
        {"chosen": b"other", KEY: "b/0"},
        {"image": b"I", "prompt": "grün", KEY: "1"},
    ]


def test_the_json_gives_columns_and_members_come_first(tmp_path):
    file = write_tar(tmp_path / "a.tar", [("0.json", b'{"prompt": "p", "chosen": "no"}'), ("0.chosen.png", b"C")])
    assert read(file) == [{"prompt": "p", "chosen": b"C", KEY: "0"}]


def test_only_what_is_wanted_is_read(tmp_path):
    file = write_tar(tmp_path / "a.tar", [("0.chosen.png", b"C"), ("0.rejected.png", b"R"), ("0.json", b'{"a": 1}')])
    assert read(file, ("rejected",)) == [{"rejected": b"R", "a": 1, KEY: "0"}]


@pytest.mark.parametrize("packed", [False, True])
def test_plain_and_gzipped(tmp_path, packed):
    members = [member for number in range(30) for member in pair_sample(number)]
    file = write_tar(tmp_path / "a.tar", members, "w:gz" if packed else "w")
    found = read(file)
    assert [each["prompt"] for each in found] == [f"prompt {number}" for number in range(30)]
    assert found[7]["chosen"] == members[21][1]


def test_hostile_members_are_named_and_the_others_are_read(tmp_path):
    long = "../" * 200 + "etc/passwd"
    hostile = [
        ("../0.chosen.png", b"x"),
        ("/etc/1.png", b"x"),
        ("a/../../2.png", b"x"),
        ("a\\..\\3.png", b"x"),
        (long, b"x"),
        special("4.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("5.png", tarfile.LNKTYPE, "0001.json"),
        special("6.png", tarfile.CHRTYPE),
        special("7.png", tarfile.BLKTYPE),
        special("8.png", tarfile.FIFOTYPE),
        special("9.png", tarfile.CONTTYPE),
        special("folder", tarfile.DIRTYPE),
    ]
    file = write_tar(tmp_path / "in" / "a.tar", [*pair_sample(1), *hostile, *pair_sample(2)])
    found = read(file)
    assert [each["prompt"] for each in found if isinstance(each, dict) and "prompt" in each] == ["prompt 1", "prompt 2"]
    assert [reason for reason, _ in faults(file)] == ["unsafe_name"] * 5 + ["link"] * 2 + ["device"] * 3
    assert all(bad for _, bad in faults(file))
    details = [each.detail for each in found if isinstance(each, BadRow)]
    assert details[0] == "'../0.chosen.png'"
    assert details[5] == "'4.png' -> '/etc/passwd'"
    assert [path.name for path in tmp_path.rglob("*")] == ["in", "a.tar"]


def test_a_name_that_is_not_utf8(tmp_path):
    file = write_tar(tmp_path / "a.tar", [("0.png", b"I"), ("1\udcff.png", b"I"), ("2.png", b"I")])
    found = read(file)  # a sample ends where the next one starts, so the refused member comes first
    assert [each.get(KEY) if isinstance(each, dict) else each.reason for each in found] == [
        "unsafe_name",
        "0",
        "2",
    ]


def test_members_and_samples_that_come_twice(tmp_path):
    twice = [("1.png", b"a"), ("1.jpg", b"b"), ("1.json", b"{}")]
    file = write_tar(tmp_path / "a.tar", [("0.png", b"x"), *twice, ("2.png", b"x"), ("0.json", b"{}"), ("3.png", b"x")])
    assert [each.get(KEY) if isinstance(each, dict) else str(each) for each in read(file)] == [
        "0",
        "duplicate_member ('1.jpg')",
        "2",
        "duplicate_sample ('0')",
        "3",
    ]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"", b"[" * 100_000])
def test_a_json_that_is_none_spoils_its_sample_alone(tmp_path, content):
    file = write_tar(tmp_path / "a.tar", [("0.png", b"x"), ("0.json", content), ("1.png", b"x")])
    first, second = read(file)
    assert first.reason == "not_json"
    assert second[KEY] == "1"


def test_files_of_no_sample_are_counted_and_not_held_against_the_file(tmp_path):
    file = write_tar(tmp_path / "a.tar", [("README", b"x"), (".DS_Store", b"x"), ("._0.png", b"x"), ("0.png", b"x")])
    assert faults(file) == [("stray_member", False)] * 3


def test_large_members_are_refused_by_their_header(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 2000)
    monkeypatch.setattr(archives, "MAX_TEXT", 100)
    members = [("0.png", bytes(2001)), ("1.png", bytes(2000)), ("2.json", b"{" + b" " * 100), ("3.png", b"")]
    assert [reason for reason, _ in faults(write_tar(tmp_path / "a.tar", members))] == ["member_too_large"] * 2


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [*pair_sample(0), *pair_sample(1)]).read_bytes()
    end = len(whole.rstrip(b"\0"))  # what follows is padding and end marks
    file = tmp_path / "cut.tar"
    for size in [*range(0, end, 97), *range(0, end, 512)]:
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"cut\.tar is not a readable tar file"):
            read(file)
        with pytest.raises(UserError, match=r"cut\.tar is not a readable tar file"):
            list(samples(file, lambda _: False))


def test_a_gzipped_tar_that_is_cut_or_damaged_is_refused(tmp_path):
    whole = write_tar(tmp_path / "a.tgz", [*pair_sample(0), *pair_sample(1)], "w:gz").read_bytes()
    file = tmp_path / "cut.tgz"
    for content in (whole[: len(whole) // 2], whole[:100], whole[:2000] + b"\xff" * 50 + whole[2050:]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"cut\.tgz is not a readable tar file"):
            read(file)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    content = bytearray(write_tar(tmp_path / "a.tar", [*pair_sample(0), *pair_sample(1)]).read_bytes())
    second = content.index(b"0001.chosen.jpg")
    content[second + 200] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="without an end mark, so it is cut short or damaged"):
        read(tmp_path / "a.tar")


def test_two_tars_in_one_file_are_not_half_read(tmp_path):
    one, two = (write_tar(tmp_path / "a.tar", pair_sample(number)).read_bytes() for number in (0, 1))
    (tmp_path / "a.tar").write_bytes(one + two)
    with pytest.raises(UserError, match="something follows its end mark"):
        read(tmp_path / "a.tar")


def test_what_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"hello" * 1000)
    with pytest.raises(UserError, match="is not a readable tar file"):
        read(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"cannot read .*: No such file"):
        read(tmp_path / "absent.tar")


@pytest.mark.parametrize("size", ["-512", "-1", "-100000"])
def test_a_negative_size_does_not_go_round_for_ever(tmp_path, size):
    info = tarfile.TarInfo("0.png")
    info.pax_headers = {"size": size}
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match=r"is not a readable tar file: .*negative"):
        read(tmp_path / "a.tar")


def test_a_header_of_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**32
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(UserError, match="a header of over 1048576 bytes"):
        read(tmp_path / "a.tar")


def test_a_sparse_map_of_gigabytes_is_not_read(tmp_path):
    info = tarfile.TarInfo("0.png")
    info.size = 3 * 2**20
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    numbers = b"999999999\n" + b"0\n" * (2**20)
    content = numbers + bytes(info.size - len(numbers))
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + content + bytes(1024))
    with pytest.raises(UserError, match="a header of over 1048576 bytes"):
        read(tmp_path / "a.tar")


def memory_of_reading(file) -> int:
    tracemalloc.start()
    try:
        assert sum(1 for _ in samples(file, ("chosen",).__contains__)) > 1
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_what_is_not_wanted(tmp_path):
    """A gzipped tar of 64 MB."""
    with tarfile.open(tmp_path / "a.tgz", "w:gz", compresslevel=1) as tar:
        for number in range(64):
            info = tarfile.TarInfo(f"{number}.other.png")
            info.size = 2**20
            tar.addfile(info, io.BytesIO(bytes(2**20)))
    assert memory_of_reading(tmp_path / "a.tgz") < 4 * 2**20


def test_memory_does_not_grow_with_the_number_of_members(tmp_path):
    file = write_tar(tmp_path / "a.tar", [(f"{number // 100}.{number % 100}.png", b"") for number in range(6000)])
    assert memory_of_reading(file) < 2 * 2**20


def test_a_long_caption_from_right_to_left_comes_through(tmp_path):
    prompt = "שלום עולם " * 10_000
    (found,) = read(
        write_tar(tmp_path / "a.tar", [("0.png", b"x"), ("0.json", json.dumps({"prompt": prompt}).encode())])
    )
    assert found["prompt"] == prompt


def with_right_sums(content: bytearray) -> bytes:
    """The tar file with every header's checksum made right again, as an attacker would."""
    for start in range(0, len(content) - 511, 512):
        block = content[start : start + 512]
        if block[257:262] == b"ustar":
            content[start + 148 : start + 156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    return bytes(content)


def test_whatever_is_changed_it_is_read_or_refused_and_counts_agree(tmp_path):
    whole = write_tar(tmp_path / "a.tar", [*pair_sample(0), *pair_sample(1)]).read_bytes()
    random, refused = Random(0), 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(3):
            place = random.randrange(len(content))
            content[place] ^= 1 << random.randrange(8)
        if random.random() < 0.3:
            del content[place : place + 512]
        (tmp_path / "a.tar").write_bytes(with_right_sums(content))
        try:
            assert len(read(tmp_path / "a.tar")) == len(list(samples(tmp_path / "a.tar", lambda _: False)))
        except UserError:
            refused += 1
    assert 0 < refused < 300
