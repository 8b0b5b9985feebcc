"""DeepSpeed's ZeRO, stages 1 and 2: the optimizer's state, and gradients, split over the processes; weights are whole.

DeepSpeed is started here and not by accelerate's `prepare`, whose backward takes the optimizer's step before anyone
could see that a gradient is not finite. Stage 3 splits the weights too, which FSDP2 does here (strategy.py).
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffpref.train.config import TrainConfig
from diffpref.train.optimizers import trained_parameters

MakeOptimizer = Callable[[Sequence[Tensor]], torch.optim.Optimizer]

STAGES = (1, 2)
MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


class Zero:
    """The whole network in every process, as in DDP, but what the optimizer keeps is split (ZeRO 1 and 2)."""

    sharded, gathers = False, True

    def __init__(self, accelerator: Accelerator, train: TrainConfig, stage: int) -> None:
        self._accelerator, self._train, self._stage = accelerator, train, stage
        self._engine: Any = None
        self._optimizer: ZeroOptimizer | None = None

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def copy(self, net: Any) -> Any:
        return copy.deepcopy(net)

    def prepare(self, net: Any, make: MakeOptimizer) -> tuple[Any, Any, Any]:
        parameters: Any = list(trained_parameters(net).values())
        optimizer = make(parameters)
        self._engine = engine_of(net, optimizer, self._stage, self._train)
        self._optimizer = ZeroOptimizer(self._engine, optimizer, parameters)
        return self._engine, self._optimizer, self._optimizer

    def synchronised(self, net: Any, last: bool) -> AbstractContextManager[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def clip(self, net: Any, limit: float) -> Tensor:
        if self._optimizer is None:
            raise ValueError("`prepare` comes first")
        return self._optimizer.clip(limit)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def whole(self, net: Any) -> Any:
        return net


class ZeroOptimizer:
    """Looks like the optimizer of the whole parameters, to whoever steps, keeps or restores it.

    engine: DeepSpeed's. optimizer: the AdamW that DeepSpeed gave flat parts of the parameters to.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
        self._engine, self.optimizer, self._parameters = engine, optimizer, parameters
        self._tensors = importlib.import_module("deepspeed.utils")
        self._stepped = True
        self.state: dict[Any, Any] = {}  # by parameter there is none: it is flat

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group with the optimizer's own settings: what is changed in them counts."""
        group = self.optimizer.param_groups[0]
        return [_Settings(group, self._parameters)]

    def step(self) -> None:
        """Clip as `clip` was told, step, and share the new weights."""
        self._engine.step()
        self._stepped = True

    def zero_grad(self) -> None:
        """Drop the gradients of a step that is not taken; after one that was, there are none."""
        if not self._stepped:
            zero = self._engine.optimizer
            zero.zero_grad(set_to_none=True)
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
            zero.micro_step_id = -1
        self._stepped = True

    def clip(self, limit: float) -> Tensor:
        """The norm of the gradients; `step` will scale them down to the limit (infinity: never)."""
        zero = self._engine.optimizer
        self._stepped = False
        zero.clip_grad = 0.0 if limit == float("inf") else limit
        norm = torch.as_tensor(zero.scaled_global_norm(), dtype=torch.float32)
        return torch.where(norm < 0, torch.inf, norm)  # DeepSpeed's -1 stands for what is not finite

    def state_dict(self) -> dict[str, Any]:
        """As the plain optimizer would have it. Every process must call it."""
        group = self.optimizer.param_groups[0]
        settings = {name: value for name, value in group.items() if name != "params"}
        groups = [{**settings, "params": list(range(len(self._parameters)))}]
        flat = self.optimizer.state.get(group["params"][0])
        if not flat:
            return {"state": {}, "param_groups": groups}
        get = self._tensors.safe_get_full_optimizer_state
        state = {
            number: {"step": flat["step"].clone()} | {name: get(parameter, name) for name in MOMENTS}
            for number, parameter in enumerate(self._parameters)
        }
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave, and the weights as they now stand in the network."""
        zero, group = self._engine.optimizer, self.optimizer.param_groups[0]
        zero.refresh_fp32_params()
        group.update({name: value for name, value in state["param_groups"][0].items() if name != "params"})
        flat = group["params"][0]
        if not state["state"]:
            self.optimizer.state.clear()
            return
        if not self.optimizer.state.get(flat):
            self.optimizer.state[flat] = {name: torch.zeros_like(flat) for name in MOMENTS}
            zero._lazy_init_hp_params_optimizer_state()
        self.optimizer.state[flat]["step"] = state["state"][0]["step"].clone()
        for number, entry in state["state"].items():
            for name in MOMENTS:
                self._tensors.safe_set_full_optimizer_state(self._parameters[number], entry[name], name)


class _Settings(dict[str, Any]):
    """An optimizer's group that shows whole parameters, and writes settings through."""

    def __init__(self, group: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
        super().__init__({**group, "params": parameters})
        self._group = group

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._group[name] = value


def stage_asked() -> int | None:
    """The ZeRO stage that accelerate's launcher asks for, None if it asks for none.

    Accelerate itself is not to hear of it: the variable by which it would is taken away.
    """
    if os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def engine_of(net: Any, optimizer: torch.optim.Optimizer, stage: int, train: TrainConfig) -> Any:
    """DeepSpeed's engine around a network and its AdamW, in the process group that is there already."""
    deepspeed: Any = importlib.import_module("deepspeed")
    for handler in logging.getLogger("DeepSpeed").handlers:
        handler.setLevel(logging.ERROR)  # it writes to stdout, where results go
    config = {
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": 1,  # the loss is divided already
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {"enabled": train.mixed_precision == "bf16", "dtype": "bfloat16"},
    }
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)[0]
