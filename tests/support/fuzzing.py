"""Values and bytes that nobody would write on purpose, and the profiles of hypothesis."""

from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
MANY = settings(QUICK, max_examples=2000)

TEXTS = st.text(max_size=40) | st.sampled_from(["", " ", "\0", "\ud800x".encode("utf-8", "replace").decode(), "‮א"])
NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.booleans()
ANYTHING: Any = st.recursive(
    st.none() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """The bytes with some of them changed, left out, repeated or cut off."""
    spoilt = bytearray(data)
    for _ in range(random.integers(1, 9)):
        start = int(random.integers(len(spoilt))) if spoilt else 0
        match random.integers(5):
            case _ if not spoilt:
                break
            case 0:
                spoilt[start] ^= 1 << int(random.integers(8))
            case 1:
                spoilt[start : start + 4] = random.bytes(4)
            case 2:
                del spoilt[start : start + int(random.integers(1, 16))]
            case 3:
                spoilt[start:start] = spoilt[start : start + 32]
            case _:
                start = int(random.integers(min(len(spoilt), 64)))  # among headers, most of all
                spoilt[start] = int(random.choice([0, 1, 0x7F, 0x80, 0xFF]))
    if random.random() < 0.1 and spoilt:
        del spoilt[int(random.integers(len(spoilt))) :]
    return bytes(spoilt)
