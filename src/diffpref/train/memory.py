"""Memory: whether it ran out, what helps in this run, how much of it there is."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from diffpref.points import Replay
from diffpref.train.config import Config

MARGIN = 0.08  # of the memory that is free, kept for what trying does not see: fragments, validation, other shapes
SHOWN = 3  # of the settings that help
RANK, SIDE = 64, 64  # what is proposed: LoRA's rank, and multiples of which a resolution is


def ran_out(config: Config, micro: int, device: torch.device, when: str) -> str:
    """One line for users. micro: how many items went through the networks at once. when: as "in step 3"."""
    train, kind = config.train, ("pair" if config.points.takes_pairs else "image") + "s" * (micro > 1)
    have = ""
    if device.type == "cuda":
        have = f" on {torch.cuda.get_device_name(device)} of {_giga(torch.cuda.mem_get_info(device)[1])}"
    return (
        f"out of memory {when}{have}, with {micro} {kind} at once (train.batch_size {train.batch_size} x "
        f"train.gradient_accumulation_steps {train.gradient_accumulation_steps}) at data.resolution "
        f"{config.data.resolution}; what helps most: {', '.join(helps(config, micro))}"
    )


def helps(config: Config, micro: int) -> list[str]:
    """The settings that would lower this run's memory most, at most three, of those that are not in force already.

    A smaller micro-batch and computing activations again come first, since they leave the result as it is.
    """
    train, whole = config.train, config.model.lora_rank == 0
    own = train.batch_size * train.gradient_accumulation_steps
    found = []
    if (smaller := half(micro, own)) is not None:
        found.append(f"train.micro_batch {smaller} (the same effective batch in smaller parts)")
    if train.gradient_checkpointing is not True:
        found.append("train.gradient_checkpointing true")
    if whole:
        found.append(f"model.lora_rank {RANK} (in place of the whole network)")
    if whole and train.optimizer in ("adamw", "schedule_free"):
        found.append("train.optimizer adamw8bit")
    if train.mixed_precision == "no":
        found.append("train.mixed_precision bf16")
    if train.ema and not train.offload_ema:
        found.append("train.offload_ema true")
    if isinstance(config.points, Replay) and config.points.sampled_at_once > micro:
        found.append(f"points.sampled_at_once {micro}")
    if train.reference_decay is not None and not whole:
        found.append("no train.reference_decay (its reference is a second network)")
    smaller_side = max(config.data.resolution // 2 // SIDE * SIDE, SIDE)
    if smaller_side < config.data.resolution:
        found.append(f"data.resolution {smaller_side}")
    return found[:SHOWN] or ["a model of fewer parameters"]


def half(micro: int, own: int) -> int | None:
    """The greatest divisor of a process's items that is at most half of a micro-batch; None for one of one item."""
    return max((size for size in range(1, micro // 2 + 1) if own % size == 0), default=None)


def freed() -> None:
    """Give back what failed attempts held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def margin_kept(device: torch.device) -> Iterator[None]:
    """While it lasts, torch may take only what leaves a margin on a GPU; beyond that it is out of memory."""
    if device.type != "cuda":
        yield
        return
    freed()
    free, total = torch.cuda.mem_get_info(device)
    mine = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((mine + free * (1 - MARGIN)) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class HostMeter:
    """How much memory this process takes beyond what it has now, where Linux tells.

    A CPU's memory is rarely refused: the process is killed instead, so what is too much must be foreseen.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
        self._before = _told(Path("/proc/self/status"), "VmRSS")

    def peak(self) -> int:
        """Bytes at most so far."""
        return max(_told(Path("/proc/self/status"), "VmHWM") - self._before, 0)

    @staticmethod
    def free() -> float:
        """Bytes that there are still, less the margin; infinite where that is not told."""
        left = [float(found) for found in (_told(Path("/proc/meminfo"), "MemAvailable"),) if found]
        with contextlib.suppress(OSError, ValueError):  # a limit of the control group, as of a container or a job
            group = Path("/sys/fs/cgroup")
            limit = int((group / "memory.max").read_text())
            left.append(limit - int((group / "memory.current").read_text()))
        return min(left) * (1 - MARGIN) if left else float("inf")


def _told(file: Path, name: str) -> int:
    """A number of kilobytes that Linux tells in a file, in bytes; 0 where it does not."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0


def _giga(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
