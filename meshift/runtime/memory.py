"""What a run keeps in memory, held against what the machine has.

It knows the roles of each method, and nothing of activations: they come on top of what is counted here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from meshift.config.plan import PlanConfig
from meshift.config.policy_runs import CriticFreeRunConfig
from meshift.config.runs import (
    DPORunConfig,
    KTORunConfig,
    PPORunConfig,
    ReferenceFreeRunConfig,
    RewardRunConfig,
    RunConfig,
    SFTRunConfig,
)
from meshift.config.sections import TrainableConfig
from meshift.models.config import HeadKind
from meshift.runtime.given_rows import actor_and_reference
from meshift.runtime.machine import Memory, machine_memory
from meshift.runtime.models import HEADS, compute_dtype, device_for_run, kept_models, resident_bytes
from meshift.runtime.policy_run import policy_models
from meshift.runtime.ppo_run import ppo_trained, role_models

TIGHT = 0.8
"""Above this share of the free memory a run may fail for its activations, which are not counted."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """A model that a run keeps; `trained` is how, or None where it stands still."""

    role: str
    name: str
    head: HeadKind
    trained: TrainableConfig | None = None


def held_models(config: RunConfig) -> list[Held]:
    """Every model that the run keeps from its first step to its last."""
    if isinstance(config, PPORunConfig):
        return _held_roles(role_models(config), ppo_trained(config), config.plan, moves=config.reference_moves)
    if isinstance(config, CriticFreeRunConfig):
        return _held_roles(
            policy_models(config), {"actor": config.actor}, config.plan, moves=config.reference_moves
        )
    if isinstance(config, DPORunConfig):
        names = actor_and_reference(config)
        if config.dpo.precompute_ref_log_probs:
            del names["reference"]
        return _held_roles(names, {"actor": config.actor}, config.plan, moves=config.reference.sync_ref_model)
    if isinstance(config, KTORunConfig):
        return _held_roles(
            actor_and_reference(config),
            {"actor": config.actor},
            config.plan,
            moves=config.reference.sync_ref_model,
        )
    if isinstance(config, ReferenceFreeRunConfig):
        names = {"actor": str(config.actor.model_name_or_path)}
        return _held_roles(names, {"actor": config.actor}, config.plan, moves=False)
    if isinstance(config, SFTRunConfig | RewardRunConfig):
        head: HeadKind = "reward" if isinstance(config, RewardRunConfig) else "lm"
        return [Held(role="model", name=str(config.model.model_name_or_path), head=head, trained=config.model)]
    return []


def _held_roles(
    names: Mapping[str, str], trained: Mapping[str, TrainableConfig], plan: PlanConfig, *, moves: bool
) -> list[Held]:
    return [
        Held(role=role, name=name, head=HEADS.get(role, "lm"), trained=trained.get(role))
        for role, name in kept_models(names, trained, plan, moves=moves).items()
    ]


def held_bytes(config: RunConfig, held: Sequence[Held]) -> int:
    """Bytes of weights, masters, gradients and optimizer moments, all roles together."""
    dtype = compute_dtype(config.dtype)
    return sum(resident_bytes(one.name, one.head, dtype, one.trained) for one in held)


def device_memory() -> Memory:
    """The memory of the device that a run would use: the GPU's, else the machine's."""
    device = device_for_run()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(device=torch.cuda.get_device_name(device), total=total, free=free)
    return machine_memory()


def memory_verdict(needed: int, memory: Memory) -> tuple[bool, str]:
    """Whether the run can fit, and a sentence: that it will not, that it may not, or what it takes."""
    gigabytes = f"{needed / 1e9:.2f} GB for weights, gradients and optimizers"
    if needed > memory.total:
        return False, (
            f"the run needs {gigabytes}, and {memory.device} has {memory.total / 1e9:.2f} GB: it will not fit; "
            "use smaller models, dtype=bfloat16, adapters (`lora`), or freeze layers with num_frozen_layers"
        )
    if needed > TIGHT * memory.free:
        return True, (
            f"{gigabytes} of {memory.free / 1e9:.2f} GB free on {memory.device}: activations come on top, so it "
            "may not fit"
        )
    return True, f"{gigabytes}, of {memory.free / 1e9:.2f} GB free on {memory.device}; activations come on top"


def peak_verdict(peaks: Sequence[float], call: str, memory: Memory) -> tuple[bool, str]:
    """Whether processes with these predicted peaks can fit, and a sentence; `call` needs the most."""
    total, most = sum(peaks), max(peaks)
    told = (
        f"{most / 1e9:.2f} GB predicted in the process that needs the most (`{call}`), {total / 1e9:.2f} GB in "
        f"all {len(peaks)} if they peak at once"
    )
    if total > memory.total:
        return False, (
            f"{told}, and {memory.device} has {memory.total / 1e9:.2f} GB: it will not fit; use fewer processes, "
            "dtype=bfloat16, a layout with `s`, or freeze layers with num_frozen_layers"
        )
    if total > TIGHT * memory.free:
        return True, f"{told}; {memory.free / 1e9:.2f} GB are free on {memory.device}, so it may not fit"
    return True, f"{told}, of {memory.free / 1e9:.2f} GB free on {memory.device}"
