"""Work on a stream: in groups, or in a few threads, in order and in bounded memory."""

import contextlib
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
MAX_THREADS = 8


def map_in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map` in threads: results in the order of the items, with only a few items in flight at a time."""
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(items: Iterable[T], most: int) -> Generator[T, None, None]:
    """The items in order, made in a thread of their own, up to `most` of them before they are asked for.

    What goes wrong in making them is raised here, in its place among them. Closed early, it waits for the one in work.
    """
    made: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(most)
    unwanted = threading.Event()

    def make() -> None:
        end: BaseException | None = None
        stream = iter(items)
        try:
            while not unwanted.is_set():
                made.put((next(stream),))
        except StopIteration:
            pass
        except BaseException as error:
            end = error
        finally:
            if isinstance(stream, Generator):
                stream.close()  # in its own thread
            made.put(end)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while isinstance(found := made.get(), tuple):
            yield found[0]
        if found is not None:
            raise found
    finally:
        unwanted.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                made.get(timeout=0.01)  # makes room, so that the thread sees that it is to end


def groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last one may be shorter."""
    group: list[T] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
