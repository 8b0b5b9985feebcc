"""Language models of transformers: where they are, how they load, and how they write with a draw for each row.

transformers draws one stream of random numbers for a whole batch, so that a row's text depends on its neighbours. Here
each token is drawn by a number that is a function of the row's draw and the token's place, and a row's text is the same
in any batch, but for the last bit of the logits, which padding may change.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffpref import hub
from diffpref.draws import uniform
from diffpref.errors import UserError
from diffpref.models.folder import weights_hash

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_batches(function: Callable[..., list[T]], size: int, *columns: Sequence[Any]) -> list[T]:
    """What `function` gives for the columns, `size` rows at a time."""
    batches = ([column[first : first + size] for column in columns] for first in range(0, len(columns[0]), size))
    return [each for batch in batches for each in function(*batch)]


def known_place(model: str | None, tool: str, option: str = "--model") -> str:
    """A model's folder or hub id. Raises UserError where it is neither by its form; the hub is not asked."""
    if model is None:
        raise UserError(f"{option}: {tool} needs a model, a folder or a hub id of the form owner/name")
    if Path(model).is_dir():
        return model
    if Path(model).exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(f"{option}: {model} is no folder and no hub id of the form owner/name")
    return model


def load_part(kind: Any, model: str, revision: str | None = None, option: str = "--model", **options: Any) -> Any:
    """`kind.from_pretrained(model)` without code of the model's own.

    Raises UserError where it does not load, RunError where the hub fails again and again.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if Path(model).is_dir():
        revision = None
    given = {"revision": revision} if revision is not None else {}
    try:
        return hub.ask(model, lambda: kind.from_pretrained(model, trust_remote_code=False, **given, **options))
    except Exception as error:  # each kind of part and of damage raises its own
        line = f"{option}: {model} does not load as {kind.__name__}: {hub.explained(error)}"
        raise hub.refusal(line, error) from error


def load_network(kind: Any, model: str, revision: str | None, dtype: Precision, device: str) -> Any:
    """A model in eval mode on a device; `auto` spreads it over all that there are. Raises UserError as `load_part`."""
    network = load_part(kind, model, revision, torch_dtype=DTYPES[dtype], device_map=device)
    return network.eval().requires_grad_(False)


def weights(model: str, revision: str | None = None) -> str:
    """What a model's texts depend on: a hash of its folder, or the commit that the hub has. Loads no weights."""
    if Path(model).is_dir():
        return weights_hash(Path(model))[:16]
    from transformers import AutoConfig

    return getattr(load_part(AutoConfig, model, revision), "_commit_hash", None) or "unknown"


def check_template(template: str, known: Sequence[str]) -> None:
    """Raise UserError for a template with other fields than the known ones."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"--template: {error}; write {{{{ and }}}} for braces") from None
    wanted = " and ".join(f"{{{name}}}" for name in known)
    for name in names:
        if name not in known:
            raise UserError(f"--template: unknown field {{{name}}}; there is {wanted}")


def plain(text: str) -> str:
    """A text on one line, without spaces at its ends or twice."""
    return " ".join(text.split())


@dataclass
class RowSampler:
    """Chooses each row's next token: the greatest score at temperature 0, else by the row's own random numbers.

    For `generate(logits_processor=[...], do_sample=False)`, of one batch. draws: a seed for each row. top_p: tokens are
    drawn from the fewest most probable ones whose share reaches it, as transformers' TopPLogitsWarper does. A number u
    in [0, 1) chooses the token at which the sum of the shares, from the most probable one on, first exceeds u.
    """

    draws: Sequence[int]
    temperature: float = 1.0
    top_p: float = 1.0
    _place: int = field(default=0, init=False)

    def __call__(
        self, input_ids: Int[Tensor, "n length"], scores: Float[Tensor, "n words"]
    ) -> Float[Tensor, "n words"]:
        """The scores, -inf but for each row's next token: (n, words)."""
        if not self.temperature:
            return scores
        shares, order = (scores.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        before = shares.cumsum(-1) - shares
        shares = shares.masked_fill(before >= self.top_p, 0.0)
        shares[:, 0].clamp_(min=torch.finfo(torch.float64).tiny)  # with top_p 0 the first one is left
        sums = shares.cumsum(-1)
        numbers = [uniform(draw, f"token {self._place}") for draw in self.draws]
        self._place += 1
        wanted = torch.tensor(numbers, dtype=torch.float64, device=scores.device)[:, None] * sums[:, -1:]
        last = (shares > 0).sum(-1, keepdim=True) - 1  # where rounding would pass the last share
        token = order.gather(-1, torch.searchsorted(sums, wanted, right=True).minimum(last))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def write(network: Any, inputs: Any, sampler: RowSampler, **lengths: int) -> Int[Tensor, "n length"]:
    """The tokens that a model writes after its inputs, one row an input: (n, length) int64 on its device.

    lengths: `max_new_tokens` or `max_length`. Of a decoder that repeats its inputs, these are cut off.
    """
    with torch.inference_mode():
        tokens = network.generate(**inputs, do_sample=False, num_beams=1, logits_processor=[sampler], **lengths)
    given = inputs["input_ids"]
    count = given.shape[1]
    return tokens[:, count:] if torch.equal(tokens[:, :count], given) else tokens
