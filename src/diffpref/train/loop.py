"""The training loop: step, watch, look, keep; what each of these does is in its own file."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from diffpref.data.ahead import Ahead
from diffpref.data.choice import Choice
from diffpref.data.loader import Loader
from diffpref.errors import Stopped
from diffpref.files import made_beside
from diffpref.models.loading import check_model, load_backbone, scheduler_config_of, weights_dtype
from diffpref.models.speed import channels_last, checkpoint_activations, compile_blocks
from diffpref.points import Replay
from diffpref.progress import Bar
from diffpref.reference import MovingReference, adapters_off, frozen_copy
from diffpref.report.page import write_report
from diffpref.sampling import refuse_sampler
from diffpref.schedules import from_scheduler_config
from diffpref.train import validation
from diffpref.train.calibration import calibrated_objective, wants_calibration
from diffpref.train.config import Config, TrainConfig
from diffpref.train.determinism import deterministic
from diffpref.train.faults import told
from diffpref.train.fitting import settled, take
from diffpref.train.optimizers import check_optimizer, make_optimizer
from diffpref.train.placing import InStep, make_placer, samples
from diffpref.train.preferences import open_dataset, open_preferences
from diffpref.train.processes import end_with_launcher, waiting_at_most
from diffpref.train.profiling import Profiler, unmeasured
from diffpref.train.reference_cache import with_reference_errors
from diffpref.train.run_folder import RunFolder
from diffpref.train.state import RunState
from diffpref.train.step import Learner
from diffpref.train.stopping import Stop
from diffpref.train.strategy import Sharded, forward_of, make_strategy
from diffpref.train.writer import Writer
from diffpref.train.zero import stage_asked

log = logging.getLogger("diffpref")


def train(config: Config, resume: bool = False, until: float | None = None, profile: int = 0) -> Path:
    """Train as configured and return the run folder; `resume` goes on from its newest valid checkpoint.

    until: the time of `time.monotonic` at which the run stops if it is not done. profile: so many steps are measured,
    see profiling.py.
    Raises UserError for wrong input, RunError when three steps in a row have no finite gradient, the guard stops, or
    memory, disk or another process fails, and Stopped after SIGINT, SIGTERM or SIGUSR1 or at that time.
    """
    with told(config), deterministic(config.train.deterministic), Stop(until) as stop:
        return _train(config, resume, profile, stop)


def _train(config: Config, resume: bool, profile: int, stop: Stop) -> Path:
    zero = stage_asked()
    end_with_launcher()
    accelerator = Accelerator(
        mixed_precision=config.train.mixed_precision,
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[waiting_at_most(config.train.process_timeout)],
    )
    weights = weights_dtype(config.train.mixed_precision, accelerator.device)
    check_optimizer(config.train)
    strategy = make_strategy(accelerator, config.train, zero)
    if not accelerator.is_main_process:
        log.setLevel(logging.ERROR)  # what is said of model and dataset is the same in all processes
    run = RunFolder(Path(config.output_dir))
    if accelerator.is_main_process:
        run.refuse_if_taken(config, resume)
    check_model(config.model, trainable=True)
    _refuse_samplers(config)
    dataset = open_dataset(config, accelerator)
    torch.manual_seed(config.train.seed)  # the adapters' first values; samples draw from their own generators
    with strategy.loading():
        backbone = load_backbone(config.model, accelerator.device, weights, trainable=True)
    if not accelerator.is_main_process:
        log.setLevel(logging.WARNING)  # of rows, each process warns of its own
    loader, heldout, choice = open_preferences(config, backbone, accelerator, dataset)
    quick = partial(_made_quick, train=config.train, device=accelerator.device, sharded=strategy.sharded)
    reference, moving = None, None
    if config.train.reference_cache:  # then the network itself does not stay in memory
        loader, heldout = with_reference_errors(config, backbone, accelerator, loader, heldout)
    elif config.train.reference_decay is not None:
        reference = moving = MovingReference(backbone, config.train.reference_decay, quick, strategy.copy)
    elif config.objective.needs_reference:
        lora = config.model.lora_rank > 0
        reference = adapters_off(backbone) if lora else frozen_copy(backbone, quick, strategy.copy)
    quick(backbone.net)  # the copy was made of the network as it was loaded
    checkpoint_activations(backbone.net, config.train.gradient_checkpointing)
    net, optimizer, stepping = strategy.prepare(backbone.net, lambda trained: make_optimizer(trained, config.train))
    policy = backbone.with_net(net)
    if isinstance(strategy, Sharded):
        strategy.lend(net, forward_of(backbone, loader))
    place = make_placer(config.points, backbone, reference, config.train, accelerator)
    state = RunState(config, run, accelerator, backbone, optimizer, place, moving, strategy.gathers)
    if resume:
        state.resume()
    if accelerator.is_main_process:  # only now, when nothing of the input can be refused any more
        run.claim(config)
        _announce(config, choice, loader, run)
    data = Ahead(loader)
    profiler = None
    if profile and accelerator.is_main_process:
        profiler = Profiler(run.path / "profile", profile, config.train.max_steps - state.step, accelerator.device)
    region = profiler.region if profiler else unmeasured
    placed = InStep(place, strategy.together) if strategy.sharded and samples(config.points) else place
    learner = Learner(
        accelerator, strategy, policy, reference, placed, data, config.objective, config.train, state.spikes, region
    )
    learner = settled(learner, config, state, stepping)
    if wants_calibration(config.objective):
        learner = replace(learner, objective=state.objective(lambda: calibrated_objective(learner)))

    def look(step: int) -> bool:
        """Validate, on the main process; the others wait. Whether the score is the best so far, in every process."""
        best, cut = False, False
        heldout_found, drawn_found = {}, {}
        uncompiled = _uncompiled(config.train)
        # what others are taking part in is finished
        cutting = contextlib.nullcontext() if strategy.sharded else stop.at_once()
        try:  # cut while the weights are the shown ones, which are put back then
            with state.shown_weights(), strategy.together(), validation.undisturbed(), cutting, uncompiled:
                if heldout is not None and accelerator.is_main_process:
                    with accelerator.autocast():
                        heldout_found = validation.heldout_metrics(
                            backbone, reference, learner.objective, place, heldout, config.validation
                        )
                if accelerator.is_main_process:
                    folder = run.samples / f"step-{step}"
                    drawn_found = validation.sample_images(
                        backbone, folder, config.validation, config.data.resolution, accelerator.device
                    )
        except Stopped:
            cut = True
        else:
            for found in filter(None, (heldout_found, drawn_found)):
                run.log({"step": step, **found})
            if scorer := validation.first_scorer(drawn_found):
                best = run.mark_best(scorer) == step
        shared: list[Any] = [best, cut, stop.wanted]  # the main process's
        broadcast_object_list(shared)  # waits
        best, cut, wanted = shared
        state.looked = not cut
        stop.hear(wanted)
        return best

    stop.among(accelerator)
    clock = _Clock(learner.items, data, state.writer)
    bar = Bar("training", config.train.max_steps, "steps", state.step, shown=accelerator.is_main_process)
    try:
        with stop.noted(), bar:
            if state.kept is None:
                look(0)
                if config.guard.action == "rollback" and not stop.agreed:
                    state.keep()  # there must be something to go back to
            elif not state.looked:  # the run was stopped while it looked
                look(state.step)
            while state.step < config.train.max_steps and not stop.agreed:
                if profiler:
                    profiler.next()
                stop.ask()
                state.set_learning_rate()
                learner, taken = take(learner, config, state, stepping)
                state.step, state.looked, entry = state.step + 1, True, taken.entry
                state.count(taken)
                if taken.skipped is None:
                    with region("average"):
                        state.average()
                clock.count()
                bar.advance(note=f"loss {entry['loss']:.4f}")
                last = state.step == config.train.max_steps
                if accelerator.is_main_process and (last or _due(state.step, config.train.logging_steps)):
                    seen = {"step": state.step, "pairs_seen": state.step * learner.items}
                    with region("log"):
                        run.log({**seen, **entry, "steps_skipped": state.skipped, **clock.rate()})
                state.writer.check()
                with clock.stopped():
                    state.watch(entry)
                    with region("validation"):
                        best = (last or _due(state.step, config.validation.steps)) and look(state.step)
                    planned = last or _due(state.step, config.train.checkpointing_steps)
                    if planned or (best and config.validation.keep_best):
                        with region("checkpoint"):
                            state.keep(planned)
            if stop.agreed and state.step not in (0, state.kept):
                state.keep(planned=False)
            state.finish()
            stop.reached = state.kept
        if stop.agreed:
            raise stop.stopped()
    finally:
        data.close()
        state.writer.close()
        if profiler:
            profiler.finish()
    with state.shown_weights():
        shown = backbone.with_net(strategy.whole(backbone.net))
        if accelerator.is_main_process:
            with made_beside(run.final) as folder:
                shown.save(folder, lora=config.model.lora_rank > 0)
    if accelerator.is_main_process:
        _list_skipped(loader, run)  # without a store, broken rows show only when they are met
        name = config.objective.name.upper().replace("_", "-")
        title = f"{name} on {config.model.pretrained}"
        again = f"diffpref train --config {run.path / 'config.yaml'} --output-dir OTHER_FOLDER"
        write_report(run.path / "report.html", title=title, run=run.path, comparison=None, reproduce=[again])
    accelerator.wait_for_everyone()
    return run.path


def _refuse_samplers(config: Config) -> None:
    """Refuse samplers that the model does not have, by its JSON files, before anything is loaded."""
    scheduler = scheduler_config_of(config.model.pretrained, config.model.revision)
    if config.validation.prompts is not None:
        refuse_sampler(config.validation.sampler, scheduler, "validation.sampler")
    if isinstance(config.points, Replay):
        refuse_sampler(config.points.sampler, scheduler, "points.sampler")
    from_scheduler_config(scheduler)  # refuses an unknown prediction type


def _uncompiled(train: TrainConfig) -> AbstractContextManager[Any]:
    """For what has batches of other sizes, each of which would be compiled for."""
    return torch.compiler.set_stance("force_eager") if train.compile else contextlib.nullcontext()


def _made_quick(net: torch.nn.Module, train: TrainConfig, device: torch.device, sharded: bool) -> None:
    channels_last(net, False if sharded else train.channels_last, device)
    if train.compile:
        compile_blocks(net)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _announce(config: Config, choice: Choice, loader: Loader, run: RunFolder) -> None:
    """Say what is trained on, and name what was left out."""
    kind = "pairs" if config.points.takes_pairs else "images"
    left_out = ", ".join(f"{count} {reason}" for reason, count in choice.dropped.items() if count)
    text = f"{len(loader)} {kind} to train on, {len(choice.heldout)} held out"
    log.info("%s%s", text, f"; left out: {left_out}" if left_out else "")
    if config.data.buckets:
        _announce_buckets(loader)
    _list_skipped(loader, run)


def _announce_buckets(loader: Loader) -> None:
    """Say how many items each shape has, and warn of those whose optimizer steps repeat items."""
    told, counts = loader.store.buckets.told, loader.shapes()
    log.info("buckets: %s", told(counts))
    if few := told([count if count < loader.run else 0 for count in counts]):
        log.warning(
            "buckets of fewer items than a step's %d, whose steps take an item several times: %s", loader.run, few
        )


def _list_skipped(loader: Loader, run: RunFolder) -> None:
    if bad := loader.store.bad:
        run.list_skipped([{"id": loader.dataset.ids[row], "reason": reason} for row, reason in bad.items()])


@dataclass
class _Clock:
    """Items a second since the last reading, and the shares of waiting for data and for checkpoints.

    Validation counts for nothing, and waiting for checkpoints not for the items a second.
    """

    items: int
    data: Ahead
    writer: Writer

    def __post_init__(self) -> None:
        self._start(time.perf_counter())

    def count(self) -> None:
        self._steps += 1

    def rate(self) -> dict[str, float]:
        now = time.perf_counter()
        data, kept = self.data.waited - self._data, self.writer.waited - self._kept
        seconds = max(now - self._started, 1e-9)
        found = {"pairs_per_second": self._steps * self.items / seconds, "data_wait": data / seconds}
        found["checkpoint_wait"] = kept / (seconds + kept)
        self._start(now)
        return found

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def _start(self, now: float) -> None:
        self._started, self._steps, self._data, self._kept = now, 0, self.data.waited, self.writer.waited
