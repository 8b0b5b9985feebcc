"""`diffpref judge`: a model of images and text compares two folders of generated images, pair by pair."""

import json as json_format
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes

from diffpref.captioners.base import CaptionOptions, identity, load_captioner
from diffpref.cli.parsing import parse, take_value
from diffpref.errors import UserError

if TYPE_CHECKING:
    from diffpref.evaluate.judging import Judgement

TEMPLATE = (
    'Both images were made for the text "{prompt}". Which one shows it better and is the better picture? '
    "Answer with one word: first, second, or tie."
)


@dataclass(frozen=True)
class JudgeOptions:
    """The judge; --config reads these keys from a YAML file."""

    judge: Literal["transformers", "endpoint"] = "transformers"
    """Any image-text-to-text model of transformers with a chat template, or an OpenAI-compatible server."""
    model: str | None = None
    """transformers: a hub id or a folder. endpoint: the model's name there."""
    revision: str | None = None
    """transformers: the hub's branch, tag or commit."""
    url: str | None = None
    """endpoint: its address up to /v1."""
    key_variable: str | None = None
    """endpoint: the NAME of the environment variable that holds its key."""
    template: str = TEMPLATE
    """What is asked of each two images; {prompt} stands for their prompt."""
    first: str = "first"
    """The word of the answer for the image shown first."""
    second: str = "second"
    """The word for the image shown second."""
    tie: str = "tie"
    """The word for neither."""
    max_new_tokens: int = 16
    """The most tokens of an answer; raise it with a template that asks for reasons."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this share together."""
    seed: int = 0
    """Of the draws, where the temperature is above 0."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """transformers: of the weights."""
    device: str = "cpu"
    """transformers: where the model runs; `auto` spreads it over all GPUs."""
    batch_size: int = 8
    """transformers: questions at once. endpoint: requests at once."""
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """endpoint: how it calls the limit of tokens."""
    timeout: float = 120.0
    """endpoint: seconds until a request counts as failed."""
    tries: int = 6
    """endpoint: how often a request is sent when the server is busy, broken or silent, with growing pauses."""


@dataclass(frozen=True)
class Judge:
    """Let a model choose between two folders' images of the same prompts and seeds, in both orders.

    --config FILE reads the judge's options from a YAML file; options given here go before the file's.
    """

    base: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
    """The base model's images."""
    tuned: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TUNED")]
    """The tuned model's images; the win rate is theirs."""
    judge: OmitArgPrefixes[JudgeOptions] = field(default_factory=JudgeOptions)
    ledger: Path | None = None
    """Where answers are kept, so that none is asked twice; TUNED.verdicts beside the images when not given."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as one JSON object."""


def main(arguments: list[str]) -> None:
    """Run the command."""
    file, arguments = take_value(arguments, "--config")
    options = JudgeOptions()
    if file is not None:
        from diffpref.train.config_file import from_yaml

        options = from_yaml(Path(file), options)
    default = Judge(base=tyro.MISSING, tuned=tyro.MISSING, judge=options)
    given = parse(Judge, arguments, prog="diffpref judge", default=default)
    chosen = given.judge
    words = {name: getattr(chosen, name) for name in ("first", "second", "tie")}
    if len({word.strip().lower() for word in words.values()} - {""}) < 3:
        raise UserError(f"--first, --second and --tie must be three words, not {', '.join(map(repr, words.values()))}")
    shared = {each.name for each in fields(CaptionOptions)}
    tool = CaptionOptions(chosen.judge, **{k: v for k, v in vars(chosen).items() if k in shared})
    who = identity(tool)
    who["judge"] = who.pop("captioner")
    from diffpref.evaluate.judging import Words, judge_folders

    result = judge_folders(
        given.base,
        given.tuned,
        partial(load_captioner, tool),  # pyright: ignore[reportArgumentType] - both can be shown two images
        who,
        Words(**words),
        given.ledger or given.tuned.resolve().with_name(f"{given.tuned.resolve().name}.verdicts"),
        chosen.seed,
        max(32, chosen.batch_size),
    )
    if given.json:
        json_format.dump(result.summary(), sys.stdout, indent=2)
        print()
        return
    print(describe(result))


def describe(result: "Judgement") -> str:
    """The judgement in a few lines of text."""
    first = "" if result.first_chosen is None else f"; the image shown first is chosen in {result.first_chosen:.1%}"
    left = f", {result.unread} without a readable answer, {result.broken} with a broken image"
    return "\n".join(
        [
            f"win rate       {result.win_rate:.1%} of tuned over base "
            f"(95% interval {result.win_rate_low:.1%} to {result.win_rate_high:.1%})",
            f"pairs          {result.pairs} of {result.prompts} prompts: "
            f"{result.wins} won, {result.losses} lost, {result.ties} tied or changed with the order"
            f"{left if result.unread or result.broken else ''}",
            f"position bias  {result.position_bias:.1%} of verdicts change with the order "
            f"(95% interval {result.position_bias_low:.1%} to {result.position_bias_high:.1%}){first}",
            f"sign test      p = {result.p_value:.2g}, over prompts",
            f"questions      {result.asked} asked now, {result.judge['judge']} {result.judge.get('model', '')}",
        ]
    )
