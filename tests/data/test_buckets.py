"""Buckets: the table by hand, which row gets which, and sizes that are read from headers alone, once."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFile, WebPImagePlugin
from support.datasets import bomb, encoded, make_images, noise, truncated_jpeg, write_rows
from support.tiny import MIXED, SIDE, make_mixed, make_pairs, write_pairs

from diffpref.data import measuring
from diffpref.data.buckets import bucket_sizes, bucket_table
from diffpref.data.dataset import Pictures, PreferenceDataset
from diffpref.data.images import ORIENTATION, BadImage, decode, upright_size
from diffpref.data.measuring import Buckets, assign_buckets, nearest
from diffpref.errors import UserError
from diffpref.train.config import DataConfig

DATA = DataConfig(resolution=SIDE, buckets=True, bucket_step=8)  # (32, 32), (40, 24), (24, 40)


class TestTable:
    def test_sdxl_by_hand(self):
        # 1024^2 / 960 = 1092.3, / 896 = 1170.3, / 832 = 1260.3, / 768 = 1365.3, / 704 = 1489.5, / 640 = 1638.4
        landscape = [(1088, 960), (1152, 896), (1216, 832), (1344, 768), (1472, 704), (1600, 640)]
        expected = [(1024, 1024)] + [size for w, h in landscape for size in ((w, h), (h, w))]
        assert bucket_table(1024, 64, 2.5) == tuple(expected)

    def test_sd15_by_hand(self):
        # 512^2 / 448 = 585.1, / 384 = 682.7, / 320 = 819.2; 768 / 320 = 2.4
        expected = ((512, 512), (576, 448), (448, 576), (640, 384), (384, 640))
        assert bucket_table(512, 64, 2.0) == expected and bucket_table(512, 64, 2.39) == expected
        assert bucket_table(512, 64, 2.4) == (*expected, (768, 320), (320, 768))

    def test_a_limit_of_one_is_the_square(self):
        assert bucket_table(512, 64, 1.0) == ((512, 512),) and bucket_table(64, 64, 100.0) == ((64, 64),)

    @pytest.mark.parametrize(("resolution", "step"), [(768, 32), (1024, 128), (32, 4)])
    def test_no_shape_has_more_pixels_and_none_could_be_a_step_longer(self, resolution, step):
        table = bucket_table(resolution, step, 4.0)
        assert len(set(table)) == len(table) > 5
        for width, height in table:
            assert width % step == height % step == 0 and width * height <= resolution**2
            assert (max(width, height) + step) * min(width, height) > resolution**2
            assert max(width, height) <= 4 * min(width, height) and (height, width) in table

    def test_without_buckets_there_is_the_square(self):
        assert bucket_sizes(replace(DATA, buckets=False, bucket_step=0)) == ((SIDE, SIDE),)

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"bucket_step": 0}, "data.bucket_step: 0 is not above 0"),
            ({"bucket_step": 12}, "data.bucket_step: the resolution of 32 is no multiple of 12"),
            ({"bucket_max_aspect": 0.5}, "data.bucket_max_aspect: 0.5 is not a finite number from 1 on"),
            ({"bucket_max_aspect": float("inf")}, "data.bucket_max_aspect: inf is not a finite number from 1 on"),
            ({"bucket_max_aspect": float("nan")}, "data.bucket_max_aspect: nan is not a finite number from 1 on"),
        ],
    )
    def test_keys_that_make_no_table(self, keys, message):
        with pytest.raises(UserError) as caught:
            bucket_sizes(replace(DATA, **keys))
        assert str(caught.value) == message


def test_nearest_is_by_ratio_whichever_side_is_longer():
    sizes = ((32, 32), (40, 24), (24, 40))  # the border lies at the root of 5/3, 1.291
    aspects = [1.0, 1.29, 1.30, 9.0, 1 / 1.29, 1 / 1.30, 0.1]
    assert nearest(sizes, np.log(aspects)).tolist() == [0, 0, 1, 1, 0, 2, 2]
    assert nearest(sizes, np.log([40 / 24]) / 2).tolist() == [0]  # just as near: the squarer one


class TestSizes:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
    @pytest.mark.parametrize("turn", [None, *range(1, 9)])
    def test_they_are_those_of_the_decoded_picture(self, kind, turn):
        options = {}
        if turn is not None and kind not in ("GIF", "BMP"):  # which have no EXIF
            exif = Image.Exif()
            exif[ORIENTATION] = turn
            options["exif"] = exif
        content = encoded(noise(1, 24, 16), kind, **options)
        assert upright_size(content) == decode(content).size
        assert upright_size(content) == ((16, 24) if options and turn >= 5 else (24, 16))

    def test_a_png_may_say_it_behind_its_pixels(self):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        content = encoded(noise(1, 24, 16), exif=exif)
        start = content.index(b"eXIf") - 4
        stop = start + 12 + int.from_bytes(content[start : start + 4], "big")
        moved = content[:start] + content[stop:-12] + content[start:stop] + content[-12:]
        assert upright_size(moved) == decode(moved).size == (16, 24)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
    def test_no_pixels_are_read(self, kind, monkeypatch):
        content = encoded(noise(1, 24, 16), kind)

        def refuse(self):
            raise AssertionError("decoded")

        monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
        monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "load", refuse)
        assert upright_size(content) == (24, 16)

    @pytest.mark.parametrize("content", [b"", b"no image", bomb(), encoded(noise(1))[:20]])
    def test_what_has_no_size_is_a_bad_image(self, content):
        with pytest.raises(BadImage):
            upright_size(content)

    def test_a_png_with_a_broken_remark_has_one(self):
        content = encoded(noise(1, 24, 16))
        broken = content[:33] + b"\0\0\0\x04tEXtab\0c\0\0\0\0" + content[33:]  # the sum is wrong
        assert upright_size(broken) == decode(broken).size == (24, 16)


def assigned(folder, rows, data: DataConfig = DATA) -> Buckets:
    return assign_buckets(folder / "store", PreferenceDataset.open(write_pairs(folder / "data", rows)), data)


class TestRows:
    def test_pairs_of_one_shape(self, tmp_path):
        found = assigned(tmp_path, make_mixed(10))
        assert found.sizes == ((32, 32), (40, 24), (24, 40)) and MIXED[4] == (90, 30)
        assert found.of_row.tolist() == [0, 1, 2, 0, 1] * 2
        assert found.told(found.counts(list(range(10)))) == "32x32: 4, 40x24: 4, 24x40: 2"

    @pytest.mark.parametrize(
        ("chosen", "rejected", "bucket"),
        [
            ((60, 20), (20, 60), 0),  # they cancel out
            ((60, 20), (20, 20), 1),  # the root of 3
            ((20, 20), (60, 20), 1),  # whichever is preferred
            ((24, 20), (20, 20), 0),
            ((90, 20), (20, 30), 1),  # 4.5 x 2/3 = 3: its root
            ((20, 90), (30, 20), 2),
        ],
    )
    def test_a_pair_goes_by_its_mean(self, tmp_path, chosen, rejected, bucket):
        (row,) = make_pairs(1)
        row = replace(row, chosen=encoded(noise(0, *chosen)), rejected=encoded(noise(1, *rejected)))
        assert assigned(tmp_path, [row]).of_row.tolist() == [bucket]

    def test_what_cannot_be_measured_does_not_count(self, tmp_path):
        long = encoded(noise(0, 60, 20))
        rows = make_pairs(2, chosen=[b"no image"] * 2, rejected=[long, truncated_jpeg()[:3]])
        assert assigned(tmp_path, rows).of_row.tolist() == [1, 0]

    def test_an_image_lies_as_its_exif_says(self, tmp_path):
        exif = Image.Exif()
        exif[ORIENTATION] = 6
        lying = encoded(noise(0, 60, 20), "JPEG", exif=exif)
        assert assigned(tmp_path, make_pairs(1, chosen=[lying], rejected=[lying])).of_row.tolist() == [2]

    def test_single_images(self, tmp_path):
        rows = [replace(row, image=encoded(noise(n, *MIXED[n % 5]))) for n, row in enumerate(make_images(5))]
        dataset = PreferenceDataset.open(write_rows(tmp_path / "data", rows))
        assert assign_buckets(tmp_path / "store", dataset, DATA).of_row.tolist() == [0, 1, 2, 0, 1]

    def test_a_batch_of_several_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="these rows are of 2 buckets, but a batch has one shape"):
            assigned(tmp_path, make_mixed(3)).of([0, 1])


class TestKept:
    @pytest.fixture
    def dataset(self, tmp_path) -> PreferenceDataset:
        return PreferenceDataset.open(write_pairs(tmp_path / "data", make_mixed(20)))

    @pytest.fixture
    def looked(self, monkeypatch) -> list[int]:
        """The rows of which images are read from here on."""
        rows, real = [], Pictures.group_images

        def group_images(self, group, wanted=None):
            for row, side, content in real(self, group, wanted):
                rows.append(row)
                yield row, side, content

        monkeypatch.setattr(Pictures, "group_images", group_images)
        return rows

    def test_a_second_start_reads_no_image(self, tmp_path, dataset, looked):
        first = assign_buckets(tmp_path / "store", dataset, DATA)
        assert sorted(set(looked)) == list(range(20))
        looked.clear()
        again = assign_buckets(tmp_path / "store", dataset, replace(DATA, resolution=64, bucket_max_aspect=1.5))
        assert looked == [] and len(again.sizes) > 1
        assert np.array_equal(assign_buckets(tmp_path / "store", dataset, DATA).of_row, first.of_row)

    def test_rows_left_out_are_not_read(self, tmp_path, dataset, looked):
        assign_buckets(tmp_path / "store", replace(dataset, left_out=dict.fromkeys(range(3, 20), "x")), DATA)
        assert sorted(set(looked)) == [0, 1, 2]
        looked.clear()
        assert assign_buckets(tmp_path / "store", dataset, DATA).of_row.tolist() == [0, 1, 2, 0, 1] * 4
        assert sorted(set(looked)) == list(range(3, 20))

    def test_a_flipped_bit_is_measured_again(self, tmp_path, dataset, looked):
        assign_buckets(tmp_path / "store", dataset, DATA)
        (file,) = (tmp_path / "store").glob("images-*.sizes")
        content = file.read_bytes()
        assert len(content) == 20 * 2 * 12
        for bit in range(0, 8 * len(content), 37):
            looked.clear()
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            file.write_bytes(damaged)
            assert assign_buckets(tmp_path / "store", dataset, DATA).of_row.tolist() == [0, 1, 2, 0, 1] * 4
            assert set(looked) == {bit // 8 // 24} and file.read_bytes() == content

    def test_what_another_has_measured_is_not_read(self, tmp_path, dataset, looked, monkeypatch):
        """Another process is done with all of it just when this one sets out."""
        assign_buckets(tmp_path / "other", dataset, DATA)
        (kept,) = (tmp_path / "other").glob("images-*.sizes")
        looked.clear()
        real = measuring.share

        def share(*arguments):
            (tmp_path / "store" / kept.name).write_bytes(kept.read_bytes())
            real(*arguments)

        monkeypatch.setattr(measuring, "share", share)
        assert assign_buckets(tmp_path / "store", dataset, DATA).of_row.tolist() == [0, 1, 2, 0, 1] * 4
        assert looked == []

    def test_a_folder_that_cannot_be_written_is_no_hindrance(self, tmp_path, dataset):
        (tmp_path / "file").write_bytes(b"")
        found = assign_buckets(tmp_path / "file" / "store", dataset, DATA)
        assert found.of_row.tolist() == [0, 1, 2, 0, 1] * 4


def test_the_widest_header_is_no_overflow():
    image = Image.new("1", (40_000, 1_500))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    assert upright_size(stream.getvalue()) == (40_000, 1_500)
