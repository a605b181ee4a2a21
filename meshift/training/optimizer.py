"""AdamW over fp32 master weights, and the learning-rate schedules.

Where the model computes in bfloat16, every parameter has an fp32 master here, and gradients are summed in fp32
over micro-batches; the model's own weights are the masters rounded once after each update. It knows nothing of
losses, batches or how gradients come about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from meshift.config.sections import TrainableConfig
from meshift.errors import ConfigError
from meshift.models.config import HeadKind
from meshift.models.decoder import Decoder
from meshift.models.shards import VALUE_HEAD, is_adapters
from meshift.parallel.data import Ranks
from meshift.training.checkpoint import restore_tensor

ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, under torch's names."""


def learning_rate(config: TrainableConfig, step: int, max_steps: int) -> float:
    """The rate of a step of the run, counted from 0.

    Linear warm-up over `warmup_steps`, then constant, or linear or cosine down to `min_lr_ratio`. The schedule
    counts steps of the run, not optimizer updates, so epochs and mini-batches cannot stretch it.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    progress = min(1.0, progress)
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.lr_scheduler_type]
    return config.learning_rate * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * decay)


def freeze_layers(model: nn.Module, num_frozen: int, num_layers: int) -> None:
    """Leave the embedding (and with it a tied head) and the lowest layers out of training."""
    if num_frozen > num_layers:
        raise ConfigError(f"num_frozen_layers = {num_frozen}, but the model has {num_layers} layers; use fewer")
    for name, parameter in model.named_parameters():
        if is_frozen(name, num_frozen):
            parameter.requires_grad_(False)


def freeze(model: Decoder, config: TrainableConfig) -> None:
    """Leave out of training what `is_trained` does not name. `ConfigError` for layers that are not there."""
    freeze_layers(model, config.num_frozen_layers, model.config.num_layers)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(name, config, model.head_kind))


def is_trained(name: str, config: TrainableConfig, head: HeadKind) -> bool:
    """Whether a role that learns changes this parameter: with `lora`, adapters and heads for numbers only."""
    if config.lora is None:
        return not is_frozen(name, config.num_frozen_layers)
    return is_adapters(name) or name == VALUE_HEAD or (head != "lm" and name == "head.weight")


def is_frozen(name: str, num_frozen: int) -> bool:
    """Whether `num_frozen_layers` leaves the decoder's parameter of this name out of training."""
    parts = name.split(".")
    if num_frozen == 0:
        return False
    return parts[0] == "embedding" or (parts[0] == "layers" and int(parts[1]) < num_frozen)


class MasterAdamW:
    """AdamW whose weights, moments and gradients are fp32, whatever the model computes in.

    Gradients arrive through `loss.backward()` and add up until `step` or `discard`.
    """

    def __init__(self, model: nn.Module, config: TrainableConfig, ranks: Ranks | None = None) -> None:
        """With `ranks`, `model` is one rank's part, and gradients are added up over ranks before an update."""
        self.max_grad_norm = config.max_grad_norm
        self._ranks = ranks
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._names, self._parameters = list(trained), list(trained.values())
        if not self._parameters and (ranks is None or ranks.stages is None):  # a stage may have frozen layers only
            raise ConfigError("every parameter is frozen; lower num_frozen_layers")
        self.masters = [_master_of(p) for p in self._parameters]
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))
                # Kernels that have a gradient in fp32 add it there themselves (`kernels.functions`).
                setattr(parameter, "gradient_sum", partial(_gradient_of, master))  # noqa: B010
        matrices = [m for m in self.masters if m.dim() >= 2]
        vectors = [m for m in self.masters if m.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]] or [torch.zeros(0)],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    def step(self, rate: float) -> float:
        """Clip, update masters, round them into the model. Returns the gradient's norm before clipping.

        A norm that is not finite leaves every weight as it was; the caller decides what that means.
        """
        norm = self._clip()
        if math.isfinite(norm):
            for group in self._adamw.param_groups:
                group["lr"] = rate
            self._adamw.step()
            self.publish()
        self.discard()
        return norm

    def _clip(self) -> float:
        """Scale the gradient down to `max_grad_norm`, over all ranks; returns its norm before that."""
        if self._ranks is None:
            return float(torch.nn.utils.clip_grad_norm_(self.masters, self.max_grad_norm))
        for master in self.masters:
            if master.grad is None:  # this rank had no rows so far
                master.grad = torch.zeros_like(master)
        gradients = {name: m.grad for name, m in zip(self._names, self.masters, strict=True) if m.grad is not None}
        self._ranks.add_gradients(gradients)
        norm = self._ranks.norm(gradients)
        torch.nn.utils.clip_grads_with_norm_(self.masters, self.max_grad_norm, torch.tensor(norm))
        return norm

    def discard(self) -> None:
        """Forget the gradients gathered so far, keeping their buffers for the next update."""
        self._adamw.zero_grad(set_to_none=False)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's own weights."""
        for parameter, master in zip(self._parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def held(self) -> list[Tensor]:
        """Everything that it keeps between steps but gradients: masters and moments, the tensors themselves."""
        moments = [value for state in self._adamw.state.values() for value in state.values()]
        return [*self.masters, *moments]

    def gradients(self) -> list[Tensor]:
        """The buffers in which gradients add up; zeros between steps."""
        return [master.grad for master in self.masters if master.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: `master/<parameter>` and, once it was updated, `<ADAM_STATE>/<parameter>`.

        The tensors are the optimizer's own, not copies. Gradients are none of it: between steps there are none.
        """
        tensors = {}
        for name, master in zip(self._names, self.masters, strict=True):
            tensors[f"master/{name}"] = master.detach()
            for key, value in self._adamw.state.get(master, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint, the model's weights too. `CheckpointError` if it is of another model."""
        for name, master in zip(self._names, self.masters, strict=True):
            restore_tensor(master, tensors, f"master/{name}")
            if f"{ADAM_STATE[0]}/{name}" not in tensors:
                continue
            # As after an update: buffers of zeros, where a gradient that adds up gives what it gave before.
            master.grad = torch.zeros_like(master)
            shapes = {"step": torch.zeros((), device=master.device)}
            self._adamw.state[master] = {key: shapes.get(key, master.grad).clone() for key in ADAM_STATE}
            for key, value in self._adamw.state[master].items():
                restore_tensor(value, tensors, f"{key}/{name}")
        self.publish()


def _master_of(parameter: Tensor) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_(True)


def _gradient_of(master: Tensor) -> Tensor:
    """The buffer in which a master's gradient adds up."""
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return master.grad


def _move_gradient_to(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)
        parameter.grad = None

    return move
