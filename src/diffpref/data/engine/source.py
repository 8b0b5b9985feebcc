"""Where the images stand that tools are asked of: the shards of a dataset, or the files of a folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable


@runtime_checkable
class Images(Protocol):
    """The images alone, by row and side; picklable, so that another process can read them. Its length is the rows'."""

    @property
    def sides(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def iter_images(self, indices: Collection[int] | None = None) -> Iterator[tuple[int, str, bytes]]:
        """(row, side, bytes) of the given rows' images, all by default; b"" where there is none."""
        ...

    def parts(self) -> Iterator[tuple[str, Images]]:
        """What is read and hashed together: each with a name that changes whenever its content is written."""
        ...

    def where(self, row: int, side: str) -> str:
        """An image's place in words, for messages."""
        ...


@runtime_checkable
class Captioned(Protocol):
    """Images with a prompt for each row, as a dataset and a folder of generated images are."""

    @property
    def path(self) -> Path: ...

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def pictures(self) -> Images: ...
