"""A dataset id of the hub, with a client that stands in for the hub's; and what is said when there is no such id."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from support.commands import fails
from support.datasets import pickapic_row, write_pickapic
from support.killing import contents

from diffpref.__main__ import main
from diffpref.data.import_options import ImportOptions
from diffpref.data.importing import import_source
from diffpref.data.sources import pickapic
from diffpref.errors import RunError, UserError


class Hub:
    """One dataset, the files of a folder, as `somebody/pairs`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fetched, self.asked = folder, [], []
        self.down: str | None = None

    def dataset_info(self, name: str, revision: str | None = None):
        self.asked.append((name, revision))
        files = sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=file) for file in files])

    def download(self, name: str, file: str, repo_type: str, revision: str) -> str:
        assert (name, repo_type, revision) == ("somebody/pairs", "dataset", "c0ffee")
        if file == self.down:
            raise ConnectionError("connection refused")
        self.fetched.append(file)
        place = self.folder.parent / "cache" / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / file, place)
        return str(place)

    def snapshot(self, name: str, repo_type: str, revision: str, allow_patterns: list[str] | None) -> str:
        self.fetched.append(allow_patterns)
        shutil.copytree(self.folder, self.folder.parent / "cache", dirs_exist_ok=True)
        return str(self.folder.parent / "cache")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    for split, parts in (("train", 3), ("test", 1)):
        for part in range(parts):
            rows = [pickapic_row(100 * part + n, label_0=0.5 * (n % 3)) for n in range(20)]
            write_pickapic(tmp_path / "hub" / "data" / f"{split}-{part:05d}-of-{parts:05d}.parquet", rows)
    (tmp_path / "hub" / "README.md").write_text("a card")
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot)
    return hub


def rows_of(folder: Path) -> dict[str, object]:
    return {name: content for name, content in contents(folder).items() if name.endswith(".parquet")}


def test_the_shards_of_the_split_are_fetched_and_no_others(hub, tmp_path):
    summary = import_source("pickapic", "somebody/pairs", tmp_path / "out", ImportOptions(revision="v2"))
    assert hub.asked == [("somebody/pairs", "v2")]
    assert hub.fetched == [f"data/train-{part:05d}-of-00003.parquet" for part in range(3)]
    assert summary.input == "somebody/pairs"
    assert summary.options["revision"] == "c0ffee"
    import_source("pickapic", hub.folder / "data", tmp_path / "local")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "local")
    assert summary.read == 60


def test_a_shard_is_fetched_when_its_turn_comes(hub, tmp_path, monkeypatch):
    read = []

    def noted(path, split, start):
        read.append((path.name, list(hub.fetched)))
        yield from reading(path, split, start)

    reading = pickapic.read_from
    monkeypatch.setattr(pickapic, "read_from", noted)
    import_source("pickapic", "somebody/pairs", tmp_path / "out")
    assert [len(fetched) for _, fetched in read] == [1, 2, 3]


def test_a_folder_of_the_dataset_and_another_split(hub, tmp_path):
    summary = import_source("pickapic", "somebody/pairs/data", tmp_path / "out", ImportOptions(split="test"))
    assert hub.fetched == ["data/test-00000-of-00001.parquet"]
    assert summary.read == 20


def test_cut_off_it_goes_on_with_the_shards_that_are_missing(hub, tmp_path, capsys):
    hub.down = "data/train-00002-of-00003.parquet"
    options = ImportOptions(shard_rows=10)
    with pytest.raises(RunError, match=r"train-00002.* \(the hub cannot be reached \(connection re"):
        import_source("pickapic", "somebody/pairs", tmp_path / "out", options)
    assert "the same command goes on from it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    hub.down, hub.fetched = None, []
    import_source("pickapic", "somebody/pairs", tmp_path / "out", options)
    assert "data/train-00000-of-00003.parquet" not in hub.fetched
    import_source("pickapic", "somebody/pairs", tmp_path / "whole", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_source_of_many_files_fetches_the_whole(hub, tmp_path):
    (hub.folder / "train.json").write_text('[{"prompt": "p", "path1": "a.jpg", "path2": "b.jpg"}]')
    for name, number in (("a.jpg", 0), ("b.jpg", 1)):
        (hub.folder / name).write_bytes(pickapic_row(number)["jpg_0"])
    assert import_source("hpdv3", "somebody/pairs", tmp_path / "out").kept == 1
    assert hub.fetched == [None]


def test_files_of_another_ending_only_where_there_are_none_of_the_first(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(pickapic, "SHARDS", (".tar", ".parquet"))
    assert import_source("pickapic", "somebody/pairs", tmp_path / "out").read == 60
    monkeypatch.setattr(pickapic, "SHARDS", (".tar", ".json"))
    with pytest.raises(UserError, match=r"holds no \.tar or \.json files"):
        import_source("pickapic", "somebody/pairs", tmp_path / "other")


def test_several_folders_need_a_choice(hub, tmp_path):
    write_pickapic(hub.folder / "more" / "train-00000-of-00001.parquet", [pickapic_row(0)])
    with pytest.raises(UserError, match="has its split 'train' in data, more: name one, as in somebody/pairs/data"):
        import_source("pickapic", "somebody/pairs", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"split": "dev"}, "somebody/pairs", "holds the splits test, train: choose one of them with --split"),
        ({}, "somebody/pairs/absent", "has no folder 'absent'"),
    ],
)
def test_what_the_dataset_does_not_have(hub, tmp_path, options, name, message):
    with pytest.raises(UserError, match=message):
        import_source("pickapic", name, tmp_path / "out", ImportOptions(**options))


def refusal(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind(f"{status} said the hub", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            refusal(errors.RepositoryNotFoundError, 404),
            "is neither a path here nor a dataset on the hub (gone, renamed",
        ),
        (refusal(errors.GatedRepoError, 403), "is gated: ask for access on its page and log in with `hf auth login`"),
        (refusal(errors.RevisionNotFoundError, 404), "dataset somebody/pairs has no revision 'v9'"),
        (errors.OfflineModeIsEnabled("offline mode is enabled"), "(HF_HUB_OFFLINE is set, and it is not in the hub's "),
    ],
)
def test_an_id_that_is_gone_gated_or_out_of_reach(hub, tmp_path, capsys, monkeypatch, error, message):
    def asked(name, revision):
        raise error

    monkeypatch.setattr(hub, "dataset_info", asked)
    command = ["data", "import", "pickapic", "somebody/pairs", str(tmp_path / "out"), "--revision", "v9"]
    line = fails(capsys, command)
    assert message in line
    assert "no revision" in line or "a copy on this machine is read by its path in place of the id" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(errors.HfHubHTTPError, 500), "(the hub answers 500 Internal Server Error, again and again: try later"),
        (ConnectionError("no route to host"), "(the hub cannot be reached (no route to host), again and again"),
    ],
)
def test_a_hub_that_stays_broken_is_no_fault_of_the_input(hub, tmp_path, capsys, monkeypatch, error, message):
    asked = []

    def info(name, revision):
        asked.append(name)
        raise error

    monkeypatch.setattr(hub, "dataset_info", info)
    assert main(["data", "import", "pickapic", "somebody/pairs", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert len(asked) == 5


def test_what_is_no_id_is_a_missing_path(hub, tmp_path):
    for name in ("pairs.parquet", "./somebody/pairs", str(tmp_path / "absent"), "~/pairs"):
        with pytest.raises(UserError, match="does not exist"):
            import_source("pickapic", name, tmp_path / "out")
    assert hub.asked == []


def test_a_local_path_comes_first_and_has_no_revision(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "hub")
    with pytest.raises(UserError, match="is a local path, which has no revisions"):
        import_source("pickapic", "data", tmp_path / "out", ImportOptions(revision="v2"))
    import_source("pickapic", "data", tmp_path / "out", ImportOptions(split="test"))
    assert hub.asked == []
