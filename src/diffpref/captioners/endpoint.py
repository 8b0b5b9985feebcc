"""A server with OpenAI's chat completions (vLLM, llama.cpp, a hosted one) as a captioner.

Images go as JPEG in a data URI. The key is read from an environment variable when the captioner is loaded, goes into
the request's header and nowhere else: whatever a server says is shown without it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from diffpref.captioners.base import Captioner, CaptionOptions, NoCaption
from diffpref.errors import RunError, UserError
from diffpref.language import check_template, plain

TAKES = (
    "url",
    "key_variable",
    "model",
    "template",
    "max_new_tokens",
    "limit_name",
    "temperature",
    "top_p",
    "seed",
    "batch_size",
    "timeout",
    "tries",
)
VERSION = "1"  # of this module: raise it whenever the requests change
QUALITY = 95  # of the JPEG
ABOUT_THE_IMAGE = (400, 413, 415, 422)  # statuses of a server that will not have this one request
BUSY = (408, 425, 429)  # and every 5xx
LONGEST_PAUSE = 60.0
SEVERAL = 4
SHOWN = 200  # characters of a server's own words


class _Refused(Exception):  # noqa: N818 - what the server does, no fault of ours
    """The server will not caption this image."""


class _Busy(Exception):  # noqa: N818
    """The server may caption this image later."""

    def __init__(self, message: str, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def pause(self, attempt: int) -> float:
        """Seconds until the next try: what the server asks for, else 1, 2, 4, ...; at most a minute."""
        try:
            wanted = float(self.retry_after or "")
        except ValueError:  # none, or a date
            wanted = 2.0 ** (attempt - 1)
        return min(max(wanted, 0.0), LONGEST_PAUSE)


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the key to another address."""

    def redirect_request(self, *given: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_StayHere)


@dataclass(frozen=True)
class Endpoint:
    """A model behind an address. The key is left out of every text that this record gives."""

    address: str
    options: CaptionOptions
    key: str | None = field(repr=False)
    worked: list[bool] = field(default_factory=list)  # not empty once there was a caption

    def __call__(
        self, images: Sequence[Image.Image], prompts: Sequence[str], draws: Sequence[int]
    ) -> list[str | NoCaption]:
        """One caption for each image, `batch_size` requests at a time, or why the server gives none.

        Raises UserError where it refuses key, address, model or several images at once and none was captioned yet,
        RunError where it stays busy, broken or silent.
        """
        return self.look([[image] for image in images], prompts, draws)

    def look(
        self, shown: Sequence[Sequence[Image.Image]], prompts: Sequence[str], draws: Sequence[int]
    ) -> list[str | NoCaption]:
        """The same for several images at once: one answer for each row of images that are shown together."""
        with ThreadPoolExecutor(self.options.batch_size) as pool:
            try:
                said = list(pool.map(self._caption, shown, prompts, draws))
            finally:
                pool.shutdown(cancel_futures=True)
        refused = [each.reason for each in said if isinstance(each, NoCaption)]
        if len(refused) < len(said):
            self.worked.append(True)
        elif len(refused) >= SEVERAL and not self.worked:  # then it is the request that is wrong, not the images
            raise UserError(f"{self.address} answers about no image: {refused[0]}")
        return said

    def _caption(self, images: Sequence[Image.Image], prompt: str, draw: int) -> str | NoCaption:
        asked = self._question(images, prompt, draw)
        for attempt in range(1, self.options.tries + 1):
            try:
                return plain(self._answer(asked)) or NoCaption("an empty answer")
            except _Refused as refusal:
                return NoCaption(f"refused, {refusal}")
            except _Busy as busy:
                if attempt == self.options.tries:
                    raise RunError(f"{self.address} gave no caption in {attempt} tries: {busy}") from None
                time.sleep(busy.pause(attempt))
        raise AssertionError("the last try returns or raises")

    def _question(self, images: Sequence[Image.Image], prompt: str, draw: int) -> bytes:
        """The body of a request: the images, then the text."""
        text = self.options.template.format(prompt=prompt)
        content = [*map(_shown, images), {"type": "text", "text": text}]
        body: dict[str, Any] = {
            "model": self.options.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": self.options.temperature,
            self.options.limit_name: self.options.max_new_tokens,
        }
        if self.options.temperature:
            body |= {"top_p": self.options.top_p, "seed": draw % 2**31}
        return json.dumps(body).encode()

    def _answer(self, asked: bytes) -> str:
        """The server's caption. Raises _Refused, _Busy, or UserError."""
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.address}/chat/completions", asked, headers)
        try:
            with _OPENER.open(request, timeout=self.options.timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._fault(error.code, error.headers.get("Retry-After"), _body(error)) from None
        except (OSError, HTTPException) as error:  # refused, reset, timed out, cut short
            reason = getattr(error, "reason", None) or error
            raise _Busy(self._clean(str(reason) or type(error).__name__)) from None
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(
                f"{self.address} answers no chat completion: {self._clean(content.decode(errors='replace'))}"
            ) from None
        return text if isinstance(text, str) else ""

    def _fault(self, status: int, retry_after: str | None, content: str) -> Exception:
        """What a status other than 200 means."""
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
        told = self._clean(f"{status} {phrase}" + (f": {content}" if content.strip() else ""))
        if status in BUSY or status >= 500:
            return _Busy(told, retry_after)
        if status in ABOUT_THE_IMAGE:
            return _Refused(told)
        if status in (401, 403):
            return UserError(
                f"{self.address} refuses the key of {self.options.key_variable or '--key-variable'}: {told}"
            )
        return UserError(f"{self.address} cannot be used (--url, --model): {told}")

    def _clean(self, text: str) -> str:
        """A server's words on one line, shortened, without the key."""
        text = plain(text)
        if self.key is not None:
            text = text.replace(self.key, "***")
        return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."


def _shown(image: Image.Image) -> dict[str, Any]:
    """An image as a part of a message."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"},
    }


def version(options: CaptionOptions) -> str:
    """Of this module. Raises UserError as `load`."""
    load(options)
    return VERSION


def load(options: CaptionOptions) -> Captioner:
    """The endpoint; nothing is sent yet.

    Raises UserError for an address or template that cannot be, or a key that is not there.
    """
    check_template(options.template, ["prompt"])
    if options.model is None:
        raise UserError("--model: the captioner 'endpoint' needs the model's name at the server")
    return Endpoint(_address(options.url), options, _key(options.key_variable))


def _address(url: str | None) -> str:
    if url is None:
        raise UserError("--url: the captioner 'endpoint' needs a server's address, as http://127.0.0.1:8000/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise UserError("--url: this is no address of the form https://host/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        # not shown: it may hold a key
        raise UserError("--url: give the address alone, up to /v1; a key goes into the variable of --key-variable")
    return url.rstrip("/").removesuffix("/chat/completions")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"--key-variable: the environment variable {variable} is not set")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"--key-variable: {variable} holds no key: it has spaces or characters that no key has")
    return key


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(4 * SHOWN).decode(errors="replace")
    except (OSError, HTTPException):
        return ""
