"""How a run is spread over processes: the whole network in each of them, or its weights split (FSDP2).

Which of the two is the launcher's to say, as accelerate's configuration files do. The split is torch's own
`fully_shard`, with the settings that accelerate reads from its file: accelerate's `prepare` splits on GPUs alone, takes
no second network, and exchanges the optimizer's parameters under it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from diffpref.data.loader import Loader
from diffpref.errors import UserError
from diffpref.models.network import networks_on
from diffpref.sharding import whole, wholes
from diffpref.train.config import TrainConfig
from diffpref.train.lockstep import Lockstep
from diffpref.train.optimizers import trained_parameters
from diffpref.train.zero import STAGES, MakeOptimizer, Zero
from diffpref.types import Backbone

SPLITS = ("adamw", "schedule_free")  # optimizers whose state is of the shape of the parameters


class Replicated:
    """The whole network in every process, whose gradients are averaged (DDP), or a single process."""

    sharded, gathers = False, False

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def loading(self) -> AbstractContextManager[None]:
        """To be entered while the network is loaded."""
        return contextlib.nullcontext()

    def copy(self, net: Any) -> Any:
        """A copy of the network as it stands now, for a reference; to be called before `prepare`."""
        return copy.deepcopy(net)

    def prepare(self, net: Any, make: MakeOptimizer) -> tuple[Any, torch.optim.Optimizer, Any]:
        """The network to train with, its optimizer, and what takes this one's steps."""
        optimizer = make(list(trained_parameters(net).values()))
        wrapped, stepping = self._accelerator.prepare(net, optimizer)
        return wrapped, optimizer, stepping

    def synchronised(self, net: Any, last: bool) -> AbstractContextManager[None]:
        """Gradients travel between processes only with the last micro-batch."""
        return contextlib.nullcontext() if last else self._accelerator.no_sync(net)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, net: Any, limit: float) -> Tensor:
        """The norm of the gradients of all processes together, which are scaled down to the limit."""
        norm: Any = self._accelerator.clip_grad_norm_(net.parameters(), limit)
        return norm

    def together(self) -> AbstractContextManager[None]:
        """To be entered, by all processes, around forwards of which not every process makes the same number."""
        return contextlib.nullcontext()

    def whole(self, net: Any) -> Any:
        """The network with whole weights, on the main process; every process must call it."""
        return net


class Sharded:
    """Every process has a part of each weight, and of what the optimizer and the references keep (FSDP2)."""

    sharded, gathers = True, True

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._outline: Any = None
        self._copies: list[Any] = []
        self._lockstep: Lockstep | None = None

    def loading(self) -> AbstractContextManager[None]:
        """The network waits on the CPU to be split: whole, it need not fit a GPU."""
        return networks_on(torch.device("cpu"))

    def copy(self, net: Any) -> Any:
        """The outline of a copy, which gets its weights with `prepare`: no second one is ever whole."""
        self._copies.append(_outline(net))
        return self._copies[-1]

    def prepare(self, net: Any, make: MakeOptimizer) -> tuple[Any, torch.optim.Optimizer, Any]:
        """Split the network and its copies where they stand; the optimizer is of the parts."""
        self._outline = _outline(net)
        self._split(net)
        for twin in self._copies:
            self._split(twin)
            parts = {name: value.detach().clone() for name, value in net.state_dict().items()}
            twin.load_state_dict(parts, assign=True)
        optimizer = make(list(trained_parameters(net).values()))
        return net, optimizer, self._accelerator.prepare_optimizer(optimizer)

    def synchronised(self, net: Any, last: bool) -> AbstractContextManager[None]:
        """Every micro-batch's gradients are joined and split: whole ones are what no process has room for."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def clip(self, net: Any, limit: float) -> Tensor:
        norm: Any = self._accelerator.clip_grad_norm_(net.parameters(), limit)
        return whole(norm)

    def lend(self, net: Any, forward: Callable[[Any], Tensor]) -> None:
        """Make `together` possible. forward: one forward, of any input, of the network that it is given."""
        self._lockstep = Lockstep(self._accelerator, [net, *self._copies], forward)

    def together(self) -> AbstractContextManager[None]:
        """Each forward within is made by all processes: those that have none of their own make one of no use."""
        if self._lockstep is None:
            raise ValueError("`lend` comes first")
        return self._lockstep.together()

    def whole(self, net: Any) -> Any:
        """A plain network on the CPU with whole weights, on the main process; every process must call it."""
        joined = wholes(trained_parameters(net))
        if not self._accelerator.is_main_process:
            return net
        found = copy.deepcopy(self._outline)
        found.load_state_dict(joined, assign=True, strict=False)
        return found

    def _split(self, net: Any) -> None:
        """fully_shard in place: the blocks that diffusers names as those not to be torn apart, and the rest.

        What trains stays fp32 and so do sums of gradients. Under bf16 weights travel as bf16. Inputs are not cast:
        autocast does that, and a time in bf16 would be another one. Nothing stays whole between two forwards, so that
        weights may change there.
        """
        bf16 = self._accelerator.mixed_precision == "bf16"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        blocks = set(getattr(net, "_no_split_modules", None) or ())
        for module in reversed(list(net.modules())):  # inner ones first
            if type(module).__name__ in blocks or module is net:
                fully_shard(module, mesh=self._mesh, reshard_after_forward=True, mp_policy=policy)


Strategy = Replicated | Sharded | Zero


def make_strategy(accelerator: Accelerator, train: TrainConfig, zero: int | None = None) -> Strategy:
    """What the launcher asks for. zero: its ZeRO stage. Raises UserError for what does not work with it."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp:
        _check_fsdp(train)
    if zero is not None:
        _check_zero(train, zero)
    if accelerator.num_processes == 1:
        return Replicated(accelerator)
    if zero:
        return Zero(accelerator, train, zero)
    return Sharded(accelerator) if fsdp else Replicated(accelerator)


def forward_of(backbone: Backbone, loader: Loader) -> Callable[[Any], Tensor]:
    """What `Sharded.lend` takes: a forward on the first item that is trained on, in one row."""
    batch = loader.batch([0])
    x_t, cond = batch.latents[:1], {name: rows[:1] for name, rows in batch.cond.items()}
    t = backbone.schedule.sample_t(torch.Generator().manual_seed(0)).reshape(1).to(x_t.device)
    return lambda net: backbone.with_net(net).predict(x_t, t, cond)


def _check_fsdp(train: TrainConfig) -> None:
    asked = {
        name: os.environ.get(f"FSDP_{name}", "false").lower() for name in ("OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING")
    }
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "fsdp_version: 1 is not supported; set it to 2, as the file of `diffpref launch-config fsdp2` does"
        )
    if asked["OFFLOAD_PARAMS"] == "true":
        raise UserError("fsdp_offload_params: weights on the CPU are not supported; set it to false")
    if asked["ACTIVATION_CHECKPOINTING"] == "true":
        raise UserError("fsdp_activation_checkpointing: use --train.gradient-checkpointing true instead")
    if train.mixed_precision == "fp16":
        raise UserError("train.mixed_precision: fp16 is not supported under FSDP2; use bf16 or no")
    if train.reference_cache:
        raise UserError(
            "train.reference_cache: under FSDP2 no process has the whole network on its device; leave it out"
        )
    if train.channels_last:
        raise UserError("train.channels_last: FSDP2 splits weights in their usual layout alone; leave it out")
    if train.optimizer not in SPLITS:
        raise UserError(f"train.optimizer: {train.optimizer} cannot be split by FSDP2; use one of {', '.join(SPLITS)}")


def _check_zero(train: TrainConfig, stage: int) -> None:
    if stage not in STAGES:
        raise UserError(
            f"zero_stage: {stage} is not supported; use 1 or 2, or FSDP2, which splits the weights as 3 does"
        )
    for part in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE", "none").lower() != "none":
            raise UserError(f"offload_{part.lower()}_device: offloading is not supported; set it to none")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise UserError("deepspeed_config_file: it is not read; use the file of `diffpref launch-config zero2`")
    if train.mixed_precision == "fp16":
        raise UserError("train.mixed_precision: fp16 is not supported under ZeRO; use bf16 or no")
    if train.optimizer != "adamw":
        raise UserError(f"train.optimizer: {train.optimizer} cannot be split by ZeRO; use adamw")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "zero_stage: ZeRO needs deepspeed: pip install deepspeed; or use FSDP2, which needs nothing more"
        )


def _outline(net: Any) -> Any:
    """A copy of a network without its weights, which take no memory."""
    empty = {
        id(value): torch.nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
        for value in net.parameters()
    }
    return copy.deepcopy(net, empty)
