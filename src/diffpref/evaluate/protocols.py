"""Published evaluations as typed values: prompts, sampler, steps, guidance, images a prompt, scorers, and the figures.

Figures are those of Stable Diffusion 1.5 and of the published Diffusion-DPO weights on it. Papers differ in prompts and
settings, so differences between base and tuned are to be compared before absolute means.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffpref.errors import UserError, nearest

Sampler = Literal["ddpm", "ddim", "dpmsolver++", "euler", "flow"]
DRO_PAPER = "Diffusion-DRO, arXiv 2510.18353"
LPO_PAPER = "LPO, arXiv 2502.01051"


@dataclass(frozen=True)
class Figure:
    """A scorer's published means: of Stable Diffusion 1.5 and of Diffusion-DPO, and the table that they stand in."""

    scorer: str
    base: float
    tuned: float
    source: str

    @property
    def delta(self) -> float:
        """What Diffusion-DPO adds."""
        return self.tuned - self.base


@dataclass(frozen=True)
class Protocol:
    """How a published evaluation is done.

    prompts: `embedded` where the set comes with diffpref; None where the user names a copy of it. source: what that is.
    splits: of a copy in parquet, the split to read; the first that is there.
    note: what the published description leaves open.
    """

    name: str
    source: str
    sampler: Sampler
    steps: int
    guidance_scale: float
    images_per_prompt: int
    scorers: tuple[str, ...]
    published: tuple[Figure, ...] = ()
    prompts: str | None = None
    splits: tuple[str, ...] = ()
    note: str = ""

    def figure(self, scorer: str) -> Figure | None:
        """The published figures of a scorer, if there are any."""
        return next((figure for figure in self.published if figure.scorer == scorer), None)


def _figures(source: str, **means: tuple[float, float]) -> tuple[Figure, ...]:
    names = {"hpsv2_1": "hpsv2.1"}
    return tuple(
        Figure(names.get(name, name.replace("_", "-")), *values, source=source) for name, values in means.items()
    )


DRO_SCORERS = ("pickscore", "hpsv2", "aesthetic-v1", "clip-h", "imagereward")
PROTOCOLS = (
    Protocol(
        name="pickapic-test",
        source="the test split of Pick-a-Pic v2 (parquet)",
        splits=("test_unique", "test"),
        sampler="ddpm",
        steps=50,
        guidance_scale=7.5,
        images_per_prompt=5,
        scorers=DRO_SCORERS,
        published=_figures(
            f"{DRO_PAPER}, table 3",
            pickscore=(20.68, 21.00),
            hpsv2=(26.88, 27.22),
            aesthetic_v1=(5.93, 5.96),
            clip_h=(0.3369, 0.3427),
            imagereward=(0.1765, 0.3369),
        ),
    ),
    Protocol(
        name="pickapic-validation",
        source="the split validation_unique of Pick-a-Pic (parquet)",
        splits=("validation_unique", "validation"),
        sampler="ddim",
        steps=20,
        guidance_scale=7.5,
        images_per_prompt=1,
        scorers=("pickscore", "hpsv2", "hpsv2.1", "aesthetic-v2", "imagereward"),
        published=_figures(
            f"{LPO_PAPER}, table 2",
            pickscore=(20.56, 20.99),
            hpsv2=(26.46, 27.03),
            hpsv2_1=(24.05, 25.54),
            aesthetic_v2=(5.468, 5.595),
            imagereward=(0.0076, 0.302),
        ),
        note="the table tells 20 steps; sampler, guidance and images a prompt are what is usual",
    ),
    Protocol(
        name="hpdv2",
        source="HPDv2's benchmark, a folder of anime.json, concept-art.json, paintings.json and photo.json",
        sampler="ddpm",
        steps=50,
        guidance_scale=7.5,
        images_per_prompt=5,
        scorers=DRO_SCORERS,
        published=_figures(
            f"{DRO_PAPER}, table 4",
            pickscore=(20.92, 21.30),
            hpsv2=(27.36, 27.75),
            aesthetic_v1=(6.22, 6.29),
            clip_h=(0.3532, 0.3584),
            imagereward=(0.2242, 0.4070),
        ),
    ),
    Protocol(
        name="partiprompts",
        source="PartiPrompts.tsv",
        sampler="ddpm",
        steps=50,
        guidance_scale=7.5,
        images_per_prompt=5,
        scorers=DRO_SCORERS,
        note="no figures are known for these settings, which are those of the other two sets",
    ),
    Protocol(
        name="embedded",
        source="the held-out prompts of the embedded world",
        prompts="embedded",
        sampler="ddim",
        steps=20,
        guidance_scale=2.0,
        images_per_prompt=1,
        scorers=("embedded-judge",),
        note="the demo's settings",
    ),
)


def protocol(name: str) -> Protocol:
    """The protocol of that name. Raises UserError with the nearest right one."""
    for known in PROTOCOLS:
        if known.name == name:
            return known
    raise UserError(f"unknown protocol {name!r}: {nearest(name, (each.name for each in PROTOCOLS))}")
