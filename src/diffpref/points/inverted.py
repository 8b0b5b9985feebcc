"""Points inverted from the images: InPO (Lu et al. 2025, arXiv 2503.18454) and SmPO (arXiv 2506.02698).

Instead of a drawn noise, x_t is where the policy itself, run backwards from the clean image without guidance, puts it
at time t, and the noise is the one that lies in x_t. Both images of a pair are inverted to one time, each to a noise of
its own. One step from time a to b takes the prediction made at a and leads the clean latents and the noise that it
implies to b: DDIM backwards (Song et al. 2021, eq. 12), for flows Euler's method.

The official files are `train.py` of JaydenLyh/InPO and of JaydenLyh/SmPO, which pin diffusers 0.20.0. Ours gives the
same where t is a multiple of `stride`, and differs where theirs follows from the code rather than from the papers:
- They step on to the first multiple at or above t, with latents that hold more noise than t has, and hand these to the
  network as of time t; the noise computed for a small t is then several times too large. Our last step ends at t.
- Their grid starts at SD's `steps_offset` of 1, after a step from time -99; ours at 0, where the clean image stands.
- They invert one pair at a time. Here all rows step together, each towards its own t, and those there stand still.
As there, ReNoise's second prediction is told the time a, though made of latents at b (its paper, arXiv 2403.14602,
tells it b and may repeat it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from diffpref.traits import PlacementTraits

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from diffpref.types import Batch, Points, Predict, Schedule


@dataclass(frozen=True)
class Inverted(PlacementTraits):
    """One time for both images of a pair, and for each the noise that the policy's own inversion finds in it."""

    method: Literal["ddim", "renoise"] = "ddim"
    """`ddim`: one prediction a step (InPO); `renoise`: the mean of two, the second where the first leads (SmPO)."""
    stride: int = 100
    """Times from one step of the inversion to the next: 100 for InPO and SDXL's SmPO, 200 for SD1.5's SmPO."""
    eta: float = 0.1
    """Share of DDIM's deviation that is added as fresh noise after each step: 0.1 for InPO, 0 for SmPO."""
    name: Literal["inverted"] = "inverted"
    positive: ClassVar[tuple[str, ...]] = ("stride",)
    not_negative: ClassVar[tuple[str, ...]] = ("eta",)

    def __call__(self, batch: Batch, schedule: Schedule, look: Predict) -> Points:
        """Points of 2 n rows for n pairs; raises ValueError if the batch holds single images.

        look: the network that inverts, of which ceil(t / stride) predictions (`renoise`: twice as many) are taken
        without gradients, t being the latest time of the batch.
        """
        import torch

        from diffpref.draws import generator
        from diffpref.moving import to_device
        from diffpref.types import Points

        clean = batch.latents
        if len(clean) != 2 * len(batch.draw):
            raise ValueError(f"inverted points need 2 rows an item, not {len(clean)} for {len(batch.draw)}")
        times = torch.stack([schedule.sample_t(generator(draw, "time")) for draw in batch.draw])
        steps = int((times.max() / self.stride).ceil())
        t = to_device(torch.cat([times, times]), clean.device)
        fresh = [generator(draw, "inversion") for draw in batch.draw]
        x = clean
        with torch.no_grad():
            for step in range(steps):
                at, to = (torch.full_like(t, k * self.stride).minimum(t) for k in (step, step + 1))
                led = _led(schedule, x, self._prediction(schedule, x, at, to, batch, look), at, to)
                if self.eta:
                    led = led + self.eta * _deviation(schedule, at, to) * _both_sides(fresh, clean)
                x = torch.where((at < to).reshape(-1, 1, 1, 1), led, x)
            spread = _signal_and_spread(schedule, t)[1]
            noise = (x - schedule.add_noise(clean, torch.zeros_like(clean), t)) / spread
            target = schedule.target(clean, noise, t)
        return Points(x_t=x, t=t, target=target, cond=batch.cond, label=batch.label, weight=batch.weight)

    def _prediction(self, schedule: Schedule, x: Tensor, at: Tensor, to: Tensor, batch: Batch, look: Predict) -> Tensor:
        """What leads from times `at` to times `to`."""
        first = look(x, at, batch.cond).float()
        if self.method == "ddim":
            return first
        return (first + look(_led(schedule, x, first, at, to), at, batch.cond).float()) / 2


def _led(schedule: Schedule, x: Tensor, prediction: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """The latents at times `to`, of the clean latents and the noise that a prediction at times `at` implies."""
    clean = schedule.to_x0(x, prediction, at)
    # The noise is read from the prediction, a linear function of it whose factor is never 0 (1, or a velocity's share
    # of signal), and not from x, which holds none at time 0 of a flow.
    nothing = clean * 0
    noise = (prediction - schedule.target(clean, nothing, at)) / schedule.target(nothing, nothing + 1, at)
    return schedule.add_noise(clean, noise, to)


def _deviation(schedule: Schedule, at: Tensor, to: Tensor) -> Tensor:
    """(rows, 1, 1, 1): DDIM's sigma between two times at eta 1 (there, eq. 16), for any signal and spread."""
    (signal, spread), (signal_to, spread_to) = _signal_and_spread(schedule, at), _signal_and_spread(schedule, to)
    added = spread_to.square() - (signal_to / signal * spread).square()  # what the way from `at` to `to` adds
    return added.clamp_min(0).sqrt() * spread / spread_to


def _signal_and_spread(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """What clean latents and noise are multiplied by at times t: (rows, 1, 1, 1) each."""
    import torch

    one = torch.ones(len(t), 1, 1, 1, device=t.device)
    return schedule.add_noise(one, one * 0, t), schedule.add_noise(one * 0, one, t)


def _both_sides(generators: list[Generator], like: Tensor) -> Tensor:
    """Normal noise for all rows, each pair's two from its own generator."""
    import torch

    from diffpref.moving import to_device

    drawn = [torch.randn(2, *like.shape[1:], generator=generator) for generator in generators]
    return to_device(torch.stack(drawn, dim=1).flatten(0, 1), like.device)
