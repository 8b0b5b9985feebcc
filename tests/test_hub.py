"""The hub fails for a while, and for good: how often it is asked, after which pauses, and what is told in the end."""

import re
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from support.hub import FakeHub

from diffpref import hub
from diffpref.data import inputs
from diffpref.errors import RunError, UserError
from diffpref.models import folder
from diffpref.scorers.parts import weights

FILES = {"model_index.json": b'{"_class_name": "StableDiffusionPipeline"}', "unet/config.json": b"{}" * 4000}


@pytest.fixture
def pauses(monkeypatch):
    """How long was slept; nobody sleeps."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


@pytest.fixture
def remote(tmp_path, monkeypatch, pauses):
    from huggingface_hub import constants

    served = FakeHub(FILES)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    yield served
    served.http.shutdown()


def first(kind: str, times: int, fault):
    """A fault of the first so many requests of a kind."""
    return lambda asked, number: fault if asked == kind and number <= times else None


def test_a_healthy_hub_is_asked_once(remote, pauses):
    found = folder.resolve("owner/name")
    assert {name: (found / name).read_bytes() for name in FILES} == FILES
    assert remote.asked.count("info") == 1 and pauses == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_what_fails_for_a_while_is_asked_again(remote, pauses, caplog, status):
    remote.fault = first("info", 2, (status, {}))
    found = folder.resolve("owner/name")
    assert (found / "unet" / "config.json").read_bytes() == FILES["unet/config.json"]
    assert remote.asked.count("info") == 3
    assert len(pauses) == 2 and 0.5 <= pauses[0] <= 1.5 and 1 <= pauses[1] <= 3
    lines = [record.message for record in caplog.records if record.name == "diffpref"]
    assert len(lines) == 2
    assert re.fullmatch(rf"owner/name: the hub answers {status} [A-Za-z ]+; try 2 of 5 in \d s", lines[0])


def test_the_pause_is_the_one_that_the_hub_names(remote, pauses):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    told = [{"Retry-After": "7"}, {"Retry-After": later}, {"RateLimit": '"api";r=0;t=55'}, {"Retry-After": "86400"}]
    remote.fault = lambda kind, number: (429, told[number - 1]) if kind == "info" and number <= 4 else None
    folder.resolve("owner/name")
    for pause, least in zip(pauses, (7, 88, 55, 300), strict=True):
        assert least <= pause <= least + 3


def test_a_hub_that_stays_broken_ends_in_one_line(remote, pauses):
    remote.fault = first("info", 99, (503, {}))
    with pytest.raises(RunError) as error:
        folder.resolve("owner/name")
    assert str(error.value) == (
        "model.pretrained: owner/name is no folder here and could not be fetched: the hub answers 503 Service "
        "Unavailable, again and again: try later, what was fetched is kept"
    )
    assert remote.asked == ["info"] * 5
    assert [0.5 * 2**n <= pause <= 1.5 * 2**n for n, pause in enumerate(pauses)] == [True] * 4
    assert len({pause / 2**n for n, pause in enumerate(pauses)}) == 4  # no two processes in step


def test_a_cut_file_is_fetched_to_its_end(remote, pauses):
    remote.fault = first("get", 3, "cut")
    found = folder.resolve("owner/name")
    assert {name: (found / name).read_bytes() for name in FILES} == FILES


def test_a_file_that_came_incomplete_is_fetched_again(remote, pauses, caplog):
    remote.fault = first("get", 1, "short")
    assert inputs._fetch("owner/name", "main", "model_index.json").read_bytes() == FILES["model_index.json"]
    assert "model_index.json of dataset owner/name: a file came incomplete; try 2 of 5 in " in caplog.text


def test_what_the_client_repeats_itself_is_not_repeated_again(remote, pauses):
    remote.fault = first("get", 99, (429, {"Retry-After": "0"}))
    with pytest.raises(RunError, match="the hub answers 429 Too Many Requests"):
        inputs._fetch("owner/name", "main", "model_index.json")
    assert remote.asked.count("get") == 6  # one, and the client's five


def test_a_file_that_fails_at_the_server_is_asked_for_again(remote, pauses):
    remote.fault = first("get", 2, (500, {}))
    assert inputs._fetch("owner/name", "main", "model_index.json").read_bytes() == FILES["model_index.json"]
    assert remote.asked.count("get") == 3


def test_a_server_that_is_not_there(remote, pauses):
    remote.http.shutdown()
    remote.http.server_close()
    with pytest.raises(RunError, match=r"the hub cannot be reached \(.*refused.*\), again and again: try later"):
        folder.resolve("owner/name")
    assert len(pauses) == 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"X-Error-Code": "RepoNotFound"}), "the hub has nothing of this name, or it is private (then log in"),
        (
            (401, {"X-Error-Code": "RepoNotFound"}),
            "the hub has nothing of this name, or it is private (then log in with `hf auth login`, or set HF_",
        ),
        ((403, {"X-Error-Code": "GatedRepo"}), "it is gated or private: ask for access on its page, then log in with"),
        ((403, {}), "it is gated or private"),
        ((404, {"X-Error-Code": "RevisionNotFound"}), "it has no such revision"),
    ],
)
def test_what_is_wrong_is_told_at_once(remote, pauses, answer, message):
    remote.fault = first("info", 99, answer)
    with pytest.raises(UserError) as error:
        folder.resolve("owner/name", revision="v9")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert remote.asked == ["info"] and pauses == []


def test_a_refused_token(remote, pauses):
    invalid = {"X-Error-Message": "Invalid credentials in Authorization header"}
    remote.fault = first("info", 99, (401, invalid))
    with pytest.raises(UserError, match="the hub does not take the token: log in"):
        folder.resolve("owner/name")
    assert pauses == []


@pytest.mark.parametrize("id", ["owner/na me", "owner/name--x"])
def test_an_id_that_cannot_be(remote, pauses, id):
    with pytest.raises(UserError, match="could not be fetched"):
        folder.resolve(id)
    assert remote.asked == [] and pauses == []


def test_weights_are_asked_for_by_the_other_names_only_while_the_hub_answers(remote, pauses):
    remote.fault = first("head", 99, (502, {}))
    with pytest.raises(
        RunError, match=r"^x: owner/name, a\.safetensors, is no file.*502 Bad Gateway, again.*NAME=WEIGHTS$"
    ):
        weights.find("owner/name", ["a.safetensors", "b.safetensors", "c.safetensors"], "x")
    assert remote.asked.count("head") == 7  # one, and once more with the client's five repetitions
    remote.fault = first("head", 0, None)
    with pytest.raises(UserError, match=r"owner/name has none of a\.safetensors"):
        weights.find("owner/name", ["a.safetensors"], "x")


def test_language_models_are_fetched_with_the_same_patience(tmp_path, monkeypatch, pauses):
    from transformers import CLIPTextModel

    from diffpref.language import load_part

    calls = []

    class Tokenizer:
        @staticmethod
        def from_pretrained(model, **options):
            calls.append(model)
            if len(calls) < 3:
                raise OSError("We couldn't connect to the hub") from ConnectionError("reset")
            return "loaded"

    assert load_part(Tokenizer, "owner/name") == "loaded"
    assert len(pauses) == 2
    with pytest.raises(UserError, match="does not load as CLIPTextModel"):
        load_part(CLIPTextModel, str(tmp_path))
    assert len(pauses) == 2


def test_errors_of_our_own_are_not_asked_again(pauses):
    def broken() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        hub.ask("x", broken)
    assert pauses == []
