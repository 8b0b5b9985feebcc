"""How many items go through the networks at once: as asked, found by trying, or halved where memory runs out.

Which items an optimizer step has, and which process has them, does not depend on it (`Learner.places`); the loss is
divided by the number of all items. So it changes the result only by rounding.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import Any

import torch

from diffpref.errors import RunError, UserError, out_of_memory
from diffpref.train import memory
from diffpref.train.calibration import wants_calibration, with_beta
from diffpref.train.config import Config
from diffpref.train.state import RunState
from diffpref.train.step import Learner, Step
from diffpref.train.validation import undisturbed
from diffpref.types import Batch

log = logging.getLogger("diffpref")
# Tensors of a parameter's size that an optimizer keeps, and their dtype (its own where None); Adafactor keeps rows and
# columns alone, and needs one in passing.
KEPT: dict[str, tuple[int, torch.dtype | None]] = {
    "adamw": (2, None),
    "adamw8bit": (2, torch.uint8),
    "adafactor": (1, None),
    "schedule_free": (2, None),
}


def settled(learner: Learner, config: Config, state: RunState, optimizer: Any) -> Learner:
    """The learner with the micro-batch that the run starts with, or goes on with if nothing was asked otherwise.

    Raises RunError where not even one item fits.
    """
    train, accelerator = config.train, learner.accelerator
    asked = [train.batch_size, train.gradient_accumulation_steps, train.micro_batch, accelerator.num_processes]
    asked.append(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    if state.split and state.split["asked"] == asked:
        micro = state.split["micro"]
    elif train.micro_batch == "auto":
        micro = _largest(learner, config, state.step, optimizer)
    else:
        micro = train.micro_batch or train.batch_size
    state.split = {"asked": asked, "micro": micro}
    return replace(learner, at_once=micro)


def take(learner: Learner, config: Config, state: RunState, optimizer: Any) -> tuple[Learner, Step]:
    """Take the coming optimizer step, and give the learner that took it: of a smaller micro-batch where memory ran out.

    Before it is taken again, everything is as if it had not been tried. That is done by one process alone: of several,
    one would be out of memory while the others wait for its gradients. Nor is a step that the optimizer began.
    Raises RunError where memory runs out for good.
    """
    own = learner.train.batch_size * learner.train.gradient_accumulation_steps
    while True:
        mark, begun = learner.place.mark(), []
        hook = optimizer.optimizer.register_step_pre_hook(lambda *given, begun=begun: begun.append(True))
        try:
            return learner, learner.step(state.step, optimizer)
        except (RuntimeError, MemoryError) as error:
            smaller = memory.half(learner.micro, own)
            alone = learner.accelerator.num_processes == 1
            if not out_of_memory(error):
                raise
            if begun or smaller is None or not alone or not config.train.halve_on_out_of_memory:
                device = learner.accelerator.device
                line = memory.ran_out(config, learner.micro, device, f"in step {state.step + 1}")
                raise RunError(line) from error
        finally:
            hook.remove()
        # only here are the failed attempt's tensors without a name
        optimizer.zero_grad()
        learner.place.back_to(mark)
        memory.freed()
        log.warning("out of memory in step %d: it is taken again with %d items at once", state.step + 1, smaller)
        learner = replace(learner, at_once=smaller)
        state.split = {**(state.split or {}), "micro": smaller}


def _largest(learner: Learner, config: Config, number: int, optimizer: Any) -> int:
    """The greatest micro-batch that goes forward and backward in every process, found from 1 upwards."""
    accelerator = learner.accelerator
    if learner.strategy.gathers:
        raise UserError(
            "train.micro_batch: auto tries in each process alone, which a network in parts over several processes does "
            "not allow; give a number"
        )
    if wants_calibration(learner.objective):  # any number will do, and the right one is not known yet
        learner = replace(learner, objective=with_beta(learner.objective, 1.0))
    own = learner.train.batch_size * learner.train.gradient_accumulation_steps
    found, peak = 0, 0
    # a compiled network would be compiled for each size
    eager = torch.compiler.set_stance("force_eager") if learner.train.compile else contextlib.nullcontext()
    with undisturbed(), eager, memory.margin_kept(accelerator.device):
        for size in (size for size in range(1, own + 1) if own % size == 0):
            fits = not _foreseen(accelerator.device, peak, found, size)
            if fits:
                meter = memory.HostMeter()
                fits = _goes(replace(learner, at_once=size), number, optimizer)
                peak = meter.peak()
            answer = torch.tensor(float(fits), device=accelerator.device)
            gathered: Any = accelerator.gather(answer[None])
            if gathered.min() < 1:
                break
            found = size
    if not found:
        raise RunError(memory.ran_out(config, 1, accelerator.device, "while trying one item"))
    if accelerator.is_main_process:
        log.info("train.micro_batch: auto is %d of %d items at once", found, own)
    return found


def _foreseen(device: torch.device, peak: int, before: int, size: int) -> bool:
    """Whether a CPU's memory cannot take a micro-batch, by what the last one took."""
    return device.type == "cpu" and before > 0 and peak * size / before > memory.HostMeter.free()


def _goes(learner: Learner, number: int, optimizer: Any) -> bool:
    """Whether a micro-batch of step `number` goes forward and backward beside all that an optimizer step holds.

    Nothing of the run changes: the gradient is dropped, what the points keep is taken back, the optimizer's state is
    stood in for by tensors of its size.
    """
    mark, device = learner.place.mark(), learner.accelerator.device
    try:
        held = _stand_ins(optimizer, learner.train.optimizer)
        for micro in range(min(learner.micros, 2)):  # the second one beside the gradient of the first
            with learner.strategy.synchronised(learner.policy.net, last=False):
                learner.descend(learner.see(_fullest(learner, number, micro)), torch.zeros((), device=device))
        del held
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    finally:
        optimizer.zero_grad()
        learner.place.back_to(mark)
        memory.freed()
    return False


def _fullest(learner: Learner, number: int, micro: int) -> Batch:
    """A micro-batch; where there are buckets, in the largest shape."""
    loader = learner.data.loader
    batch = loader.batch(learner.places(number, micro))
    side = loader.data.resolution
    shape = learner.policy.latent_shape(side, side)
    if batch.latents.shape[1:] == torch.Size(shape):
        return batch
    return replace(batch, latents=batch.latents.new_zeros(len(batch.latents), *shape))


def _stand_ins(optimizer: Any, name: str) -> list[torch.Tensor]:
    """Tensors of the size of the optimizer's state, as long as it has none."""
    if any(optimizer.state.values()):  # schedule-free's has an empty entry for each
        return []
    count, dtype = KEPT[name]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [torch.empty_like(parameter, dtype=dtype) for parameter in parameters for _ in range(count)]
