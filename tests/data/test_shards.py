"""Shards: what is written is read back, and what is damaged, half-written or not finite never is."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from xxhash import xxh3_64_intdigest

from diffpref.data import shard as shard_file
from diffpref.data import shards
from diffpref.data.shard import TensorWriter
from diffpref.data.shards import Shards, as_keys, key_of
from diffpref.errors import RunError, UserError


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 3, 2, generator=torch.Generator().manual_seed(seed)).half().float()


def of(letters: str) -> np.ndarray:
    """A key for each letter."""
    return as_keys([key_of(letter) for letter in letters])


def held(stored: Shards, letters: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    """The letters whose keys are stored."""
    return "".join(letter for letter, place in zip(letters, stored.find(of(letters)), strict=True) if place >= 0)


def write(folder: Path, keys: str, seed: int = 0, kind: str = "latents", recipe: str = "r1") -> torch.Tensor:
    """One shard with a row for each letter of `keys`."""
    writer, values = TensorWriter(folder, kind, recipe), rows(len(keys), seed)
    writer.add(of(keys), values)
    writer.close()
    return values


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    values = write(tmp_path, "abcd")
    stored = Shards(tmp_path, "latents", "r1")
    found = stored.rows(of("dad"))
    assert found.dtype == torch.float32 and torch.equal(found, values[[3, 0, 3]])
    assert held(stored) == "abcd" and stored.damaged == []


def test_rows_of_another_memory_order_are_stored_too(tmp_path):
    writer, values = TensorWriter(tmp_path, "latents", "r1"), rows(3)
    writer.add(of("abc"), values.to(memory_format=torch.channels_last))  # as convolutions give large images back
    writer.close()
    assert torch.equal(Shards(tmp_path, "latents", "r1").rows(of("abc")), values)


def test_shards_are_written_when_enough_is_together(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "SHARD_BYTES", 2 * 2 * 24)  # two rows of 24 fp16 values
    writer, values = TensorWriter(tmp_path, "latents", "r1"), rows(5)
    for number in range(5):
        writer.add(of(str(number)), values[number : number + 1])
        if writer.due:
            writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert held(Shards(tmp_path, "latents", "r1"), "01234") == "0123"
    writer.close()
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert torch.equal(Shards(tmp_path, "latents", "r1").rows(of("01234")), values)


def test_an_empty_writer_writes_nothing(tmp_path):
    TensorWriter(tmp_path / "new", "latents", "r1").close()
    assert list((tmp_path / "new").iterdir()) == []


def test_values_are_rounded_to_fp16(tmp_path):
    writer = TensorWriter(tmp_path, "text", "r1")
    writer.add(of("a"), torch.tensor([[1.0, 1 / 3, 65504.0]]))
    writer.close()
    assert Shards(tmp_path, "text", "r1").rows(of("a")).tolist() == [[1.0, 0.333251953125, 65504.0]]


def test_kinds_and_recipes_do_not_mix(tmp_path):
    write(tmp_path, "a", 1)
    write(tmp_path, "b", 2, recipe="r2")
    write(tmp_path, "c", 3, kind="text_text")
    assert held(Shards(tmp_path, "latents", "r1")) == "a"
    assert held(Shards(tmp_path, "latents", "r2")) == "b"
    assert held(Shards(tmp_path, "text_text", "r1")) == "c"


def test_a_key_that_is_not_stored_is_named(tmp_path):
    write(tmp_path, "ab")
    with pytest.raises(UserError, match=f"the store lacks {key_of('z').hex()}; build it again"):
        Shards(tmp_path, "latents", "r1").rows(of("az"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e5, -1e5])
def test_values_that_fp16_cannot_hold_are_refused_by_name(tmp_path, value):
    writer, values = TensorWriter(tmp_path, "latents", "r1"), rows(3).float()
    values[1, 0, 0, 0] = value
    with pytest.raises(RunError, match=f"not finite in fp16: {key_of('b').hex()}"):
        writer.add(of("abc"), values)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def damage(file: Path, bit: int, cut: int = 0, quietly: bool = True) -> None:
    """Turn a bit of a file, or cut it; quietly, its time stays as it was."""
    content, seen = bytearray(file.read_bytes()), file.stat()
    content[bit // 8] ^= 1 << bit % 8
    file.unlink()  # what was mapped stays as it was
    file.write_bytes(content[: len(content) - cut])
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns if quietly else seen.st_mtime_ns + 1))


def row_bit(file: Path, row: torch.Tensor) -> int:
    """The number of a bit in the middle of a row."""
    return 8 * (file.read_bytes().index(row.half().numpy().tobytes()) + 10) + 3


def test_a_flipped_bit_in_a_row_costs_that_row_alone(tmp_path):
    values = write(tmp_path, "abcd")
    (shard,) = tmp_path.glob("*.safetensors")
    damage(shard, row_bit(shard, values[1]), quietly=False)
    for _ in range(2):  # found, then noted
        stored = Shards(tmp_path, "latents", "r1")
        assert stored.damaged == [shard] and held(stored) == "acd"
        assert torch.equal(stored.rows(of("acd")), values[[0, 2, 3]])
    again = write(tmp_path, "b", 1)
    assert torch.equal(Shards(tmp_path, "latents", "r1").rows(of("ab")), torch.stack([values[0], again[0]]))


def test_a_flip_that_keeps_size_and_time_is_found_when_the_row_is_read(tmp_path):
    values = write(tmp_path, "abcd")
    (shard,) = tmp_path.glob("*.safetensors")
    damage(shard, row_bit(shard, values[1]))
    stored = Shards(tmp_path, "latents", "r1")
    assert held(stored) == "abcd" and torch.equal(stored.rows(of("a")), values[:1])
    with pytest.raises(RunError, match=r"is damaged; start again"):
        stored.rows(of("ab"))
    assert held(Shards(tmp_path, "latents", "r1")) == "acd"  # the next start has been told


def test_all_shards_are_summed_when_asked_to(tmp_path):
    values = write(tmp_path, "abcd")
    (shard,) = tmp_path.glob("*.safetensors")
    damage(shard, row_bit(shard, values[3]))
    assert held(Shards(tmp_path, "latents", "r1", summed=True)) == "abc"


@pytest.mark.parametrize(("trimmed", "large"), [(False, 0), (False, 2**20), (True, 2**20)])
def test_a_thousand_flips_and_cuts_are_never_read(tmp_path, trimmed, large, monkeypatch):
    """Half of them keep size and time. What is read at all is what was written."""
    monkeypatch.setattr(shard_file, "LARGE_BYTES", large)
    values = rows(4)
    if trimmed:
        values[1, 2:] = values[2] = 0
    writer = TensorWriter(tmp_path, "text", "r1", trimmed)
    writer.add(of("abcd"), values)
    writer.close()
    (shard,), (sidecar,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.json")
    whole, noted, random = shard.read_bytes(), sidecar.read_text(), np.random.default_rng(0)
    time, found = shard.stat().st_mtime_ns, {"read": 0, "refused": 0, "absent": 0}
    for number in range(500):
        damage(
            shard,
            int(random.integers(8 * len(whole))),
            int(random.integers(1, 99)) * (number % 5 == 0),
            number % 2 == 0,
        )
        stored = Shards(tmp_path, "text", "r1")
        intact = 0
        for letter, value in zip("abcd", values, strict=True):
            try:
                assert torch.equal(stored.rows(of(letter))[0], value)
                intact += 1
                found["read"] += 1
            except RunError:
                found["refused"] += 1
            except UserError:
                found["absent"] += 1
        assert intact < 4, number
        shard.write_bytes(whole)
        os.utime(shard, ns=(time, time))
        sidecar.write_text(noted)
    assert min(found.values()) > 50


@pytest.mark.parametrize("large", [0, 2**20])
def test_rows_of_several_shards_come_in_the_order_asked_for(tmp_path, large, monkeypatch):
    monkeypatch.setattr(shard_file, "LARGE_BYTES", large)
    first, second = write(tmp_path, "abc"), write(tmp_path, "de", seed=1)
    stored = Shards(tmp_path, "latents", "r1")
    expected = torch.stack([second[1], first[2], second[0], first[0], second[1]])
    for block in (1, 3 * first[0].numel() * 2, 2**20):  # bytes: one row at once, three, all
        monkeypatch.setattr(shards, "BLOCK_BYTES", block)
        assert torch.equal(stored.rows(of("ecdae")), expected)


def test_zeros_at_the_ends_of_rows_are_not_stored_and_come_back_bit_by_bit(tmp_path):
    values = torch.randn(3, 300, 8, generator=torch.Generator().manual_seed(0)).half().float()
    values[0, 7:], values[1] = 0, 0
    values[2, 100:], values[2, 120, 3] = 0, -0.0
    writer = TensorWriter(tmp_path, "text", "r1", trimmed=True)
    writer.add(of("abc"), values)
    writer.close()
    stored = Shards(tmp_path, "text", "r1")
    assert torch.equal(stored.rows(of("cab")).view(torch.int32), values[[2, 0, 1]].view(torch.int32))
    assert stored.nbytes < (7 + 0 + 121) * 16 + 1000 and stored.shape == (300, 8)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"keys": ["a"]}', '{"sha256": "0"}', '{"keys": 1, "sha256": "0"}']
)
def test_a_damaged_sidecar_hides_its_shard(tmp_path, content):
    write(tmp_path, "a")
    (sidecar,) = tmp_path.glob("*.json")
    sidecar.write_text(content)
    stored = Shards(tmp_path, "latents", "r1")
    assert len(stored) == 0 and len(stored.damaged) == 1


def test_a_missing_shard_is_a_hole(tmp_path):
    write(tmp_path, "a")
    (shard,) = tmp_path.glob("*.safetensors")
    shard.unlink()
    assert Shards(tmp_path, "latents", "r1").damaged == [shard]


def test_a_half_written_shard_is_not_read(tmp_path):
    write(tmp_path, "a")
    (sidecar,) = tmp_path.glob("*.json")
    sidecar.rename(sidecar.with_suffix(".json.part"))
    stored = Shards(tmp_path, "latents", "r1")
    assert len(stored) == 0 and stored.damaged == []


@pytest.mark.parametrize("kill_at", [0, 1, 2])
def test_a_killed_builder_leaves_nothing_that_is_read(tmp_path, kill_at):
    """Killed before the shard has its name, before its sidecar is written, and before that has its name."""
    program = f"""
        import os, pathlib, signal, sys
        sys.path.insert(0, {str(Path(shard_file.__file__).parents[2])!r})
        import torch
        from diffpref.data import shard, shards
        calls, flush = [], shard.flush
        def flush_or_die(path):
            flush(path)
            calls.append(path)
            if (len(calls), {kill_at}) in ((1, 0), (2, 2)):
                os.kill(os.getpid(), signal.SIGKILL)
        rename = pathlib.Path.rename
        def rename_or_die(path, target):
            rename(path, target)
            if {kill_at} == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        shard.flush, pathlib.Path.rename = flush_or_die, rename_or_die
        writer = shard.TensorWriter(pathlib.Path({str(tmp_path)!r}), "latents", "r1")
        writer.add(shards.as_keys([shards.key_of("a")]), torch.ones(1, 4))
        writer.close()
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -9
    assert len(list(tmp_path.iterdir())) == 1 + (kill_at == 2)
    stored = Shards(tmp_path, "latents", "r1")
    assert len(stored) == 0 and stored.damaged == []


def test_two_writers_at_once_lose_nothing(tmp_path):
    first, second = (TensorWriter(tmp_path, "latents", "r1") for _ in range(2))
    values = rows(3)
    first.add(of("ab"), values[:2])
    second.add(of("bc"), values[1:])  # the same content under the same key
    first.close()
    second.close()
    stored = Shards(tmp_path, "latents", "r1")
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert torch.equal(stored.rows(of("abc")), values)


def test_the_sum_in_the_sidecar_is_that_of_the_file(tmp_path):
    import hashlib

    write(tmp_path, "ab")
    (shard,), (sidecar,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.json")
    entry, seen = json.loads(sidecar.read_text()), shard.stat()
    assert entry["sha256"] == hashlib.sha256(shard.read_bytes()).hexdigest() and entry["lost"] == []
    assert (entry["bytes"], entry["mtime_ns"]) == (seen.st_size, seen.st_mtime_ns)
    sums = load_file(shard)  # any reader of safetensors finds all in the shard
    assert [key.tobytes() for key in sums["keys"]] == [key_of("a"), key_of("b")]
    assert sums["sums"].tolist() == [xxh3_64_intdigest(row.tobytes()) for row in sums["rows"]]


def test_a_folder_that_cannot_be_written_is_refused_at_the_first_row(tmp_path, monkeypatch):
    writer = TensorWriter(tmp_path, "latents", "r1")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(PermissionError, match="Permission denied"):
        writer.add(of("a"), rows(1))


def test_a_shard_is_summed_once_when_its_time_is_another(tmp_path, monkeypatch):
    summed = []
    real = shard_file.sha256
    monkeypatch.setattr(shard_file, "sha256", lambda file: summed.append(file) or real(file))
    write(tmp_path, "ab")
    stored = Shards(tmp_path, "latents", "r1")
    values = write(tmp_path, "cd", seed=1)
    stored.refresh()
    assert summed == [] and held(stored) == "abcd" and torch.equal(stored.rows(of("cd")), values)
    for file in tmp_path.glob("*.safetensors"):  # as a copy has it
        os.utime(file, ns=(0, 10**9))
    for expected in (2, 2):
        assert held(Shards(tmp_path, "latents", "r1")) == "abcd" and len(summed) == expected


def test_keys_of_the_same_first_bytes_are_told_apart(tmp_path):
    keys = np.zeros((5, 32), np.uint8)
    keys[:, 31] = range(5)
    writer, values = TensorWriter(tmp_path, "latents", "r1"), rows(4)
    writer.add(keys[[2, 0, 3, 1]], values)
    writer.close()
    stored = Shards(tmp_path, "latents", "r1")
    assert torch.equal(stored.rows(keys[:4]), values[[1, 3, 0, 2]]) and stored.find(keys[4:]).tolist() == [-1]


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([[True, False, True], [False, False, True]]),
        torch.tensor([[70_000, -3], [5, 2**40]]),
        torch.tensor([[7, 3], [5, 2]], dtype=torch.int32),
        torch.tensor([0.25, 4.0]),  # one number a row
        torch.tensor([3, 100_001]),
    ],
    ids=str,
)
def test_masks_whole_numbers_and_short_rows_come_back_as_they_were(tmp_path, values):
    writer = TensorWriter(tmp_path, "text_mask", "r1")
    writer.add(of("ab"), values)
    writer.close()
    found = Shards(tmp_path, "text_mask", "r1").rows(of("ba"))
    assert found.dtype == values.dtype and torch.equal(found, values[[1, 0]])
