"""The hub asked with patience: what fails for a while is tried again, what is wrong is told at once, in one line.

huggingface_hub (as of 2.4) repeats most requests by which a file comes, and none of its questions. What it repeated in
vain is not repeated here again.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeVar

from diffpref.errors import RunError, UserError, first_line

log = logging.getLogger("diffpref")
T = TypeVar("T")
TRIES = 5
LONGEST = 300.0  # seconds: the hub counts requests in windows of five minutes
BUSY = (408, 425, 429, 500, 502, 503, 504)
BROKEN = ("TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError")  # of httpx, and of its second one
REPEATED = ("TimeoutException", "ConnectError", "RemoteProtocolError")  # by huggingface_hub, while a file comes
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_chance = random.Random()  # of its own: nothing else may depend on how often the hub failed


def ask(what: str, call: Callable[[], T]) -> T:
    """What `call` gives, which asks the hub for `what`; called again, after a pause, while hub or network fail.

    The pause is the one that the hub names, else 1, 2, 4 ... seconds, half more or less by chance. Raises what the last
    call raised; `explained` tells it to users.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except Exception as error:
            if attempt == TRIES or not passes(error) or _was_repeated(error):
                raise
            pause = _pause(error, attempt)
            log.warning("%s: %s; try %d of %d in %.0f s", what, _symptom(error), attempt + 1, TRIES, pause)
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def passes(error: BaseException) -> bool:
    """Whether this is a fault of hub or network that may be gone a little later."""
    for cause in _chain(error):
        if _named(cause, ("OfflineModeIsEnabled", "HFValidationError")):
            return False
        if (status := _status(cause)) is not None:
            return status in BUSY
        if _of_network(cause) or "Consistency check failed" in str(cause):
            return True
    return False


def explained(error: Exception) -> str:
    """One line, without its end: what went wrong with the hub, and what helps."""
    chain = list(_chain(error))
    status = next((found for cause in chain if (found := _status(cause)) is not None), None)
    if any(_named(cause, ("OfflineModeIsEnabled",)) for cause in chain):
        return "HF_HUB_OFFLINE is set, and it is not in the hub's cache on this machine"
    if any(_named(cause, ("GatedRepoError",)) for cause in chain) or status == 403:
        return f"it is gated or private: ask for access on its page, then {LOG_IN}"
    if any(_named(cause, ("RevisionNotFoundError",)) for cause in chain):
        return "it has no such revision"
    if any(_named(cause, ("RepositoryNotFoundError",)) for cause in chain):
        return f"the hub has nothing of this name, or it is private (then {LOG_IN})"
    if status == 401:
        return f"the hub does not take the token: {LOG_IN}"
    if passes(error):
        return f"{_symptom(error)}, again and again: try later, what was fetched is kept"
    return first_line(error)


def refusal(message: str, error: Exception, kind: type[UserError] = UserError) -> Exception:
    """The error of this message: RunError where hub or network failed, else `kind`, for the input is wrong."""
    return RunError(message) if passes(error) else kind(message)


def _symptom(error: BaseException) -> str:
    for cause in _chain(error):
        if (status := _status(cause)) is not None:
            phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
            return f"the hub answers {status} {phrase}".rstrip()
        if _of_network(cause):
            return f"the hub cannot be reached ({' '.join(str(cause).split()) or type(cause).__name__})"
    return "a file came incomplete"


def _pause(error: BaseException, attempt: int) -> float:
    headers: Any = next((cause.response.headers for cause in _chain(error) if _status(cause) is not None), {})  # pyright: ignore
    wanted = _seconds(headers.get("Retry-After") or "")
    if wanted is None and (reset := re.search(r"\bt=(\d+)", headers.get("RateLimit") or "")):
        wanted = float(reset[1])
    if wanted is None:
        return 2.0 ** (attempt - 1) * _chance.uniform(0.5, 1.5)
    return min(wanted, LONGEST) + _chance.uniform(0.0, 1.0)  # many processes were told the same


def _seconds(told: str) -> float | None:
    """What Retry-After says, seconds or a date; None where it says neither."""
    if told.strip().isdecimal():
        return float(told)
    try:
        then = parsedate_to_datetime(told)
    except ValueError:
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return max((then - datetime.now(UTC)).total_seconds(), 0.0)


def _was_repeated(error: BaseException) -> bool:
    """Whether huggingface_hub repeated this very request itself, a HEAD or GET of a file."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        try:
            request: Any = response.request if response is not None else getattr(cause, "request", None)
        except RuntimeError:  # httpx raises it for a request that is not told
            request = None
        if request is not None:
            if "/api/" in str(request.url):
                return False
            return request.method == "HEAD" or _status(cause) in (408, 429) or _named(cause, REPEATED)
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _of_network(error: BaseException) -> bool:
    http = type(error).__module__.startswith("httpx") and _named(error, BROKEN)
    return http or isinstance(error, ConnectionError | TimeoutError)


def _named(error: BaseException, names: tuple[str, ...]) -> bool:
    """Whether an error is of one of these kinds, none of which can be imported before the hub's client is."""
    return any(kind.__name__ in names for kind in type(error).__mro__)
