"""What changes during a run, and how it is kept and taken back: the step, the weights, their average, the guard."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffpref.errors import RunError, UserError
from diffpref.objectives import Objective
from diffpref.reference import MovingReference
from diffpref.sharding import local, rejoined, split
from diffpref.train import checkpoint
from diffpref.train.calibration import with_beta
from diffpref.train.checkpoint import Checkpoint
from diffpref.train.config import Config
from diffpref.train.ema import EMA
from diffpref.train.guard import Guard
from diffpref.train.kept import newest_whole
from diffpref.train.optimizers import evaluation_weights, make_lr_schedule, trained_parameters
from diffpref.train.placing import Placer
from diffpref.train.run_folder import RunFolder
from diffpref.train.spikes import Spikes
from diffpref.train.step import NOT_FINITE, Step
from diffpref.train.writer import Writer
from diffpref.types import Backbone

log = logging.getLogger("diffpref")
NON_FINITE_LIMIT = 3  # steps in a row


class RunState:
    """The state of a run. With the configuration, `step` is all that decides the next sample."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        accelerator: Accelerator,
        backbone: Backbone,
        optimizer: Any,
        place: Placer,
        reference: MovingReference | None = None,
        gathers: bool = False,
    ) -> None:
        self.step, self.non_finite, self.skipped = 0, 0, 0
        self.spikes = Spikes(config.train.skip_spikes) if config.train.skip_spikes else None
        self.beta: float | None = None  # what `auto` was found to be
        self.split: dict[str, Any] | None = None  # how many items go through the networks at once: see fitting.py
        self.looked = True  # whether what is due after this step's end, to look at it, is done
        self.kept: int | None = None  # the step of the newest checkpoint, which may still be being written
        self.writer = Writer()
        self._config, self._run, self._accelerator = config, run, accelerator
        self._net, self._optimizer, self._place = backbone.net, optimizer, place
        train = config.train
        self._items = train.batch_size * train.gradient_accumulation_steps * accelerator.num_processes
        self._rate = make_lr_schedule(train, accelerator.num_processes)
        # The main process alone shows and keeps weights and so averages them, unless others have parts of what it keeps
        self._gives = gathers and not accelerator.is_main_process
        averages = train.ema and (gathers or accelerator.is_main_process)
        self._ema = EMA(self._net, train.ema_decay, train.offload_ema) if averages else None
        self._reference = reference  # of every process, each of which moves its own
        self._guard = Guard(config.guard)

    def set_learning_rate(self) -> None:
        """Give the optimizer the rate of the coming step, a function of the step and the guard's factor."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(self.step) * self._guard.factor

    def objective(self, calibrate: Callable[[], Objective]) -> Objective:
        """The objective with the beta that the run found at its start; `calibrate` finds it."""
        if self.beta is not None:
            return with_beta(self._config.objective, self.beta)
        found: Any = calibrate()
        self.beta = found.beta
        return found

    def count(self, taken: Step) -> None:
        """Hear of the step that was just taken, which `step` counts already.

        One that was not applied is logged with its items. Raises RunError after three in a row that are not finite.
        """
        if taken.skipped is None:
            self.non_finite = 0
            return
        self.skipped += 1
        names = ", ".join(taken.items) or "no single sample's gradient"
        self._warn(f"step {self.step} is {taken.skipped} and was not applied ({names})")
        if self._accelerator.is_main_process:
            self._run.log({"step": self.step, "skipped": taken.skipped, "items": list(taken.items)})
        if taken.skipped == NOT_FINITE:
            self.non_finite += 1
        if self.non_finite >= NON_FINITE_LIMIT:
            found = f"{self.non_finite} steps in a row were not finite, the last at step {self.step}: {names}"
            raise RunError(found)

    def _warn(self, text: str) -> None:
        """Say once what all processes see."""
        if self._accelerator.is_main_process:
            log.warning("%s", text)

    def average(self) -> None:
        """Take the weights after a step into their average, and let the reference follow them."""
        if self._ema:
            self._ema.update(self._net, self.step)
        if self._reference:
            self._reference.follow(self._net)

    @contextlib.contextmanager
    def shown_weights(self) -> Iterator[None]:
        """The weights that are validated and published: their average, if there is one."""
        with (
            evaluation_weights(self._optimizer),
            self._ema.applied(self._net) if self._ema else contextlib.nullcontext(),
        ):
            yield

    def watch(self, entry: dict[str, float]) -> None:
        """Let the guard see a step's metrics, and do what it says. Raises RunError where it ends the run."""
        policy, reference = entry.get("policy_error_chosen"), entry.get("reference_error_chosen")
        if policy is None or reference is None:
            return
        verdict = self._guard.observe(self.step, policy, reference)
        if verdict == "warn":
            self._warn(self._guard.message)
        elif verdict == "stop":
            raise RunError(self._guard.message)
        elif verdict == "rollback" and self._guard.good is not None:
            self.finish()
            found = checkpoint.at(self._run.checkpoints, self._guard.good)
            if found is None:
                raise RunError(f"{self._guard.message}; the checkpoint of step {self._guard.good} is damaged")
            self._restore(found)
            self._warn(f"{self._guard.message}; back to the weights of step {found.step}")

    def keep(self, planned: bool = True) -> None:
        """Take a checkpoint, on the main process; it is written while the training goes on. Others give their parts.

        One that is not planned is there because of its score or because the run stops; the guard does not go back to
        it, for neither may change the training. Raises RunError if the checkpoint before it could not be written.
        """
        points = self._place.state()  # of all processes, which it joins
        if planned:
            self._guard.kept(self.step)
        self.kept = self.step
        if not self._accelerator.is_main_process and not self._gives:
            return
        extra = {"points": points}
        extra["ema"] = rejoined(self._ema.state(), trained_parameters(self._net)) if self._ema else {}
        extra["reference"] = self._reference.state() if self._reference else {}
        if self._gives:
            checkpoint.joined(self._net, self._optimizer, extra)
            return
        scaler = self._accelerator.scaler.state_dict() if self._accelerator.scaler else None
        state = {"items_per_step": self._items, "processes": self._accelerator.num_processes, "looked": self.looked}
        state |= {"non_finite": self.non_finite, "scaler": scaler, "beta": self.beta, "guard": self._guard.state()}
        state |= {"skipped": self.skipped, "spikes": self.spikes.state() if self.spikes else None, "split": self.split}
        train, run, step = self._config.train, self._run, self.step
        protected = {self._guard.good or 0} if self._config.guard.action == "rollback" else set()
        if self._config.validation.keep_best and (best := run.best()):
            protected = protected | {best["step"]}

        def save(captured: Checkpoint) -> Path:
            run.flush_metrics()
            limit, every = train.checkpoints_total_limit, train.checkpoints_keep_every
            return checkpoint.save(run.checkpoints, captured, limit, protected, every)

        self.writer.write(lambda host: checkpoint.capture(step, self._net, self._optimizer, state, extra, host), save)

    def finish(self) -> None:
        """Wait, in all processes, until the newest checkpoint is complete. Raises RunError if it cannot be written."""
        self.writer.wait()
        self._accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Go on from the newest checkpoint that is whole, or from the start if there is none.

        The main process chooses. Raises UserError for another effective batch, RunError where a process does not find
        the main one's checkpoint.
        """
        chosen: list[int | None] = [None]
        if self._accelerator.is_main_process:
            newest, damaged = newest_whole(self._run.checkpoints)
            for each in damaged:
                log.warning("%s is damaged and was passed over: %s", each.path, each.damage)
            chosen = [newest.step if newest else None]
        broadcast_object_list(chosen)
        step = chosen[0]
        if step is not None:
            found = checkpoint.at(self._run.checkpoints, step)
            if found is None:
                rank = self._accelerator.process_index
                raise RunError(f"{self._run.checkpoints / f'step-{step}'} is not whole as process {rank} sees it")
            if found.state["items_per_step"] != self._items:
                raise UserError(
                    f"train.batch_size x train.gradient_accumulation_steps x processes is {self._items}, but the run "
                    f"to resume has {found.state['items_per_step']}"
                )
            self._restore(found)
            self.step = self.kept = found.step
            self.non_finite, self.beta, self.looked = (found.state[key] for key in ("non_finite", "beta", "looked"))
            self.skipped, self.split = found.state.get("skipped", 0), found.state.get("split")
            self._guard.restore(found.state["guard"])
            if self.spikes and found.state.get("spikes"):
                self.spikes.restore(found.state["spikes"])
            self._place.restore(found.extra.get("points", {}))
            if self._accelerator.scaler:
                self._accelerator.scaler.load_state_dict(found.state["scaler"])
            log.info("going on from step %d", self.step)
        if self._accelerator.is_main_process:
            self._run.rewind_metrics(-1 if step is None else step, self.looked)
            if best := self._run.best():
                self._run.mark_best(best["scorer"])  # of steps that will be taken again there is no best one yet
        self._accelerator.wait_for_everyone()

    def _restore(self, found: Checkpoint) -> None:
        checkpoint.restore(found, self._net, self._optimizer)
        if self._ema:
            trained = trained_parameters(self._net)
            averages = found.extra.get("ema", {}).items()
            self._ema.restore({name: local(split(value, trained[name])) for name, value in averages})
        if self._reference:
            self._reference.restore(found.extra.get("reference", {}))
