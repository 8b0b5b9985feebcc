"""Streams that are made ahead: the same items, in order, with errors in their place, and an end that ends."""

import threading
import time

import pytest

from diffpref.data.threads import ahead


def test_items_come_in_order_and_so_does_an_error():
    def items():
        yield from range(5)
        raise ValueError("five")

    stream, found = ahead(items(), 2), []
    with pytest.raises(ValueError, match="five"):
        found.extend(iter(lambda: next(stream), None))
    assert found == [0, 1, 2, 3, 4] and list(ahead([], 1)) == []


def test_it_is_ahead_by_no_more_than_it_may():
    made = []

    def items():
        for n in range(50):
            made.append(n)
            yield n

    stream = ahead(items(), 3)
    assert next(stream) == 0
    until = time.monotonic() + 10
    while len(made) < 5 and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(made) == 5  # one taken, three waiting, one in work
    assert list(stream) == list(range(1, 50))


def test_closed_early_it_ends_its_thread_and_closes_what_it_reads():
    closed = []

    def items():
        try:
            yield from range(10**9)
        finally:
            closed.append(threading.current_thread().name)

    stream = ahead(items(), 2)
    next(stream)
    stream.close()
    assert closed == ["ahead"] and "ahead" not in [thread.name for thread in threading.enumerate()]
