"""The endpoint against a server of our own: what is sent, what is tried again, and that the key goes nowhere else."""

import base64
import io
import json
from dataclasses import asdict
from threading import Event

import numpy as np
import pytest
from PIL import Image
from support.datasets import noise
from support.server import Server, completion

from diffpref.captioners import endpoint
from diffpref.captioners.base import CaptionOptions, NoCaption, identity, load_captioner
from diffpref.errors import RunError, UserError

KEY = "sk-very-secret-0123456789"
IMAGES = [noise(n, 3, 3).resize((48, 48), Image.Resampling.BICUBIC) for n in range(9)]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("THE_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def pauses(monkeypatch):
    found: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", found.append)
    return found


def captioner(server, **options):
    given = {"model": "eyes", "key_variable": "THE_KEY", "template": "What of {prompt}?", "batch_size": 1} | options
    return load_captioner(CaptionOptions("endpoint", url=server.url, **given))


def ask(whole, count: int = 1):
    return whole(IMAGES[:count], [f"prompt {n}" for n in range(count)], list(range(count)))


def test_what_is_sent(server):
    assert ask(captioner(server, max_new_tokens=77), 2) == ["caption 0", "caption 1"]
    path, headers, body = server.seen[1]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("eyes", 0.0, 77)
    assert "seed" not in body
    (message,) = body["messages"]
    image, text = message["content"]
    assert text == {"type": "text", "text": "What of prompt 1?"}
    start, data = image["image_url"]["url"].split(",")
    assert (image["type"], start) == ("image_url", "data:image/jpeg;base64")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float)
    sent = np.abs(shown - np.asarray(IMAGES[1], float)).mean(), np.abs(shown - np.asarray(IMAGES[0], float)).mean()
    assert sent[0] < 3 and sent[1] > 30


def test_sampling_and_the_newer_name_of_the_limit(server):
    ask(captioner(server, temperature=0.5, top_p=0.9, limit_name="max_completion_tokens", key_variable=None))
    _, headers, body = server.seen[0]
    assert (body["temperature"], body["top_p"], body["seed"], body["max_completion_tokens"]) == (0.5, 0.9, 0, 128)
    assert "max_tokens" not in body and "Authorization" not in headers


def test_captions_are_in_order_however_many_at_once(server):
    server.reply = lambda number, body: (200, {}, completion(f" {body['messages'][0]['content'][1]['text']}\n"))
    assert ask(captioner(server, batch_size=4), 9) == [f"What of prompt {n}?" for n in range(9)]


def test_busy_servers_are_asked_again(server, pauses):
    first = [(429, {"Retry-After": "7"}, b"slow down"), (500, {}, b""), (503, {"Retry-After": "a date"}, b"")]
    server.reply = lambda number, body: first[number] if number < 3 else (200, {}, completion("done"))
    assert ask(captioner(server)) == ["done"]
    assert pauses == [7.0, 2.0, 4.0]
    assert len({json.dumps(body) for _, _, body in server.seen}) == 1


def test_a_server_that_stays_busy(server, pauses, caplog, capfd):
    server.reply = lambda number, body: (429, {"Retry-After": "900"}, f"too many for {KEY}".encode())
    with pytest.raises(RunError) as raised:
        ask(captioner(server, tries=3))
    told = f"{server.url} gave no caption in 3 tries: 429 Too Many Requests: too many for ***"
    assert str(raised.value) == told
    assert pauses == [60.0, 60.0]
    assert KEY not in caplog.text + "".join(capfd.readouterr())
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


def test_silence_and_a_closed_door(server, pauses):
    whole = captioner(server, tries=2, timeout=0.05)
    release = Event()
    server.reply = lambda number, body: (release.wait(5), (200, {}, completion("late")))[1]
    with pytest.raises(RunError, match=r"gave no caption in 2 tries: .*timed out"):
        ask(whole)
    release.set()
    closed = load_captioner(CaptionOptions("endpoint", url="http://127.0.0.1:9/v1", model="m", tries=2))
    with pytest.raises(RunError, match=r"^http://127.0.0.1:9/v1 gave no caption in 2 tries: .*refused"):
        ask(closed)
    assert pauses == [1.0, 1.0]


def test_an_image_that_is_refused_has_no_caption(server, pauses):
    server.reply = lambda number, body: (
        (400, {}, f"no such pictures, {KEY}".encode()) if number == 1 else (200, {}, completion("fine"))
    )
    refused = NoCaption("refused, 400 Bad Request: no such pictures, ***")
    assert ask(captioner(server), 3) == ["fine", refused, "fine"]
    server.reply = lambda number, body: (200, {}, completion(None))
    assert ask(captioner(server)) == [NoCaption("an empty answer")]
    assert pauses == []


def test_a_server_that_refuses_everything_from_the_start_stops(server):
    server.reply = lambda number, body: (400, {}, b"unknown parameter")
    whole = captioner(server)
    with pytest.raises(UserError, match=r"answers about no image: refused, 400 Bad Request: unknown parameter$"):
        ask(whole, 4)
    assert len(ask(whole, 3)) == 3  # so few may all be bad
    server.reply = lambda number, body: (200, {}, completion("fine"))
    ask(whole)
    server.reply = lambda number, body: (400, {}, b"no")
    assert ask(whole, 4) == [NoCaption("refused, 400 Bad Request: no")] * 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, f"bad key {KEY}".encode()), "{url} refuses the key of THE_KEY: 401 Unauthorized: bad key ***"),
        ((404, {}, b"no model eyes"), "{url} cannot be used (--url, --model): 404 Not Found: no model eyes"),
        ((302, {"Location": "http://elsewhere/"}, b""), "{url} cannot be used (--url, --model): 302 Found"),
        ((200, {}, f"<html> {KEY}".encode()), "{url} answers no chat completion: <html> ***"),
        ((200, {}, b"[" * 50_000), "{url} answers no chat completion: " + "[" * 200 + " ..."),
        ((200, {}, b'{"choices": []}'), '{url} answers no chat completion: {{"choices": []}}'),
    ],
)
def test_what_will_not_get_better_stops_at_once(server, pauses, answer, message):
    server.reply = lambda number, body: answer
    with pytest.raises(UserError) as raised:
        ask(captioner(server))
    assert str(raised.value) == message.format(url=server.url)
    assert len(server.seen) == 1 and pauses == []


def test_the_key_is_in_no_text_of_the_captioner(server):
    whole = captioner(server)
    assert KEY not in f"{whole!r} {asdict(whole.options)} {identity(whole.options)}"
    assert "key_variable" not in identity(whole.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "m"}, "--url: the captioner 'endpoint' needs a server's address, as http://127.0.0.1:8000/v1"),
        ({"url": "http://h/v1"}, "--model: the captioner 'endpoint' needs the model's name at the server"),
        ({"url": "ftp://h/v1", "model": "m"}, "--url: this is no address of the form https://host/v1"),
        ({"url": "h:8000", "model": "m"}, "--url: this is no address of the form https://host/v1"),
        ({"url": f"https://me:{KEY}@h/v1", "model": "m"}, "--url: give the address alone, up to /v1; a key goes "),
        ({"url": f"https://h/v1?key={KEY}", "model": "m"}, "--url: give the address alone, up to /v1; a key goes "),
        (
            {"url": "https://h", "model": "m", "key_variable": "NO_KEY"},
            "--key-variable: the environment variable NO_KEY is not set",
        ),
        ({"url": "https://h", "model": "m", "key_variable": "TWO"}, "--key-variable: TWO holds no key: it has spaces"),
        ({"url": "https://h", "model": "m", "template": "{x}"}, "--template: unknown field {x}; there is {prompt}"),
        ({"url": "https://h", "model": "m", "dtype": "bf16"}, "--dtype: the captioner 'endpoint' has no such option"),
    ],
)
def test_options_that_cannot_be(monkeypatch, options, message):
    monkeypatch.delenv("NO_KEY", raising=False)
    monkeypatch.setenv("TWO", f"{KEY}\nX-Other: 1")
    with pytest.raises(UserError) as raised:
        load_captioner(CaptionOptions("endpoint", **options))
    assert str(raised.value).startswith(message)
    assert KEY not in str(raised.value)


def test_the_whole_path_may_be_given(server):
    whole = load_captioner(CaptionOptions("endpoint", url=f"{server.url}/chat/completions/", model="m"))
    assert ask(whole) == ["caption 0"] and server.seen[0][0] == "/v1/chat/completions"
