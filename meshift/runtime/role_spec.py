"""What makes a role: its model, how it is trained, whether it generates; opened in this process, or over several.

A method's job is built from these specs by whatever `Opener` it is given, so that it is written once. It knows
nothing of methods, nor of how processes are started.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from meshift.config.sections import TrainableConfig
from meshift.models.adapters import add_adapter, merged_model, share_frozen, without_adapter
from meshift.models.config import HeadKind
from meshift.models.decoder import Decoder
from meshift.models.hf.save import save_adapter, save_model
from meshift.models.two_heads import add_value_head, one_head_of
from meshift.parallel.groups import Place
from meshift.runtime.models import adapter_of, model_folder, open_model
from meshift.runtime.observer import Observer, SilentObserver
from meshift.runtime.role import LocalRole


@dataclass(frozen=True, kw_only=True)
class RoleSpec:
    """A role before it is opened. `config` is how it is computed with, and where `max_steps` is set, trained.

    `seed` is of its mini-batches, `head_seed` of a head that the model lacks; with `zero_head` it begins at zero.
    With `decode` it generates, in `num_slots`; a reference that `moves` has others' weights mixed into its own;
    a language model with a `value_head` has a second head, which begins at zero.
    """

    name: str
    model: str
    dtype: torch.dtype
    config: TrainableConfig
    head: HeadKind = "lm"
    max_steps: int | None = None
    seed: int = 0
    head_seed: int = 0
    zero_head: bool = False
    value_head: bool = False
    num_slots: int = 1
    moves: bool = False
    decode: Callable[[list[int]], str] | None = None

    def open_model(self, *, to_cut: bool = False) -> Decoder:
        """The whole model, the same each time; `to_cut` is as in `models.open_model`."""
        model = open_model(self.model, self.head, self.dtype, seed=self.head_seed, to_cut=to_cut)
        if self.zero_head:
            model.head.load_state_dict({"weight": torch.zeros(1, model.config.hidden_size)})
        if self.value_head:
            add_value_head(model)
        adapter = None if self.max_steps is None else adapter_of(self.model, self.config)
        return model if adapter is None else add_adapter(model, adapter, self.seed)

    def reads_frozen(self, other: RoleSpec) -> bool:
        """Whether it reads just what `other`, which learns by adapters, leaves as it is; a score head apart."""
        learns_beside = other.max_steps is not None and other.config.lora is not None
        same = (self.head == "lm") == (other.head == "lm") and self.dtype == other.dtype
        still = self.max_steps is None and self.decode is None and not self.moves
        return learns_beside and same and still and model_folder(self.model) == model_folder(other.model)

    def make(
        self, model: Decoder, place: Place | None = None, trainable: bool | None = None, *, offload: bool = False
    ) -> LocalRole:
        """The role with this model, or its part of it at `place`; trained if the spec says so, or as given."""
        role = LocalRole(
            self.name,
            model,
            self.config,
            trainable=self.max_steps is not None if trainable is None else trainable,
            max_steps=self.max_steps or 1,
            seed=self.seed,
            place=place,
            offload=offload,
        )
        return role if self.decode is None else role.can_generate(self.num_slots, self.decode)


class Opener(Protocol):
    """Opens the roles of a run where they are to be. `observer` hears what there is to say meanwhile."""

    observer: Observer

    def open(self, spec: RoleSpec) -> Any:
        """A `LocalRole`, or what has its `generate`, `infer`, `whole` and `fixed_weights` over several processes.

        Every process of a run opens the same roles in the same order, and uses them at the same points.
        """


class LocalOpener:
    """Opens roles in this process; those named `offloaded` leave the device between calls.

    A reference that reads the actor's model is opened after it: where the actor learns by adapters, the weights
    beside them are the reference's too, and there is no second copy. So it is with a reward model and its critic.
    """

    def __init__(self, observer: Observer | None = None, offloaded: frozenset[str] = frozenset()) -> None:
        self.observer = observer or SilentObserver()
        self._offloaded = offloaded
        self._adapted: list[tuple[RoleSpec, Decoder]] = []

    def open(self, spec: RoleSpec) -> LocalRole:
        """See `Opener`."""
        model = self._frozen_of_another(spec) or spec.open_model()
        if model.config.adapter is not None and spec.name not in self._offloaded:
            self._adapted.append((spec, model))
        return spec.make(model, offload=spec.name in self._offloaded)

    def _frozen_of_another(self, spec: RoleSpec) -> Decoder | None:
        """What another role leaves frozen, if it is this one's model. One that leaves the device takes its own."""
        if spec.name in self._offloaded:
            return None
        model = next((model for other, model in self._adapted if spec.reads_frozen(other)), None)
        if model is None:
            return None
        return without_adapter(model) if spec.head == "lm" else share_frozen(spec.open_model(), model)


def frozen_like(trained: TrainableConfig) -> TrainableConfig:
    """How a role that stands still is computed with: in micro-batches as those of a trained one."""
    return TrainableConfig(
        max_tokens_per_micro_batch=trained.max_tokens_per_micro_batch, logits_chunk=trained.logits_chunk
    )


def save_role(role: Any, folder: Path, tokenizer: object, head: HeadKind = "lm") -> None:
    """Save the role's model, or its adapters; over several processes all call this, and the first one saves.

    Of a model with two heads, `head` says which.
    """
    model = role.whole()
    if model is None:
        return
    if model.config.value_head:
        model = one_head_of(model, head)
    adapter = model.config.adapter
    if adapter is None:
        save_model(model, folder, tokenizer=tokenizer)
    elif adapter.save_merged:
        save_model(merged_model(model), folder, tokenizer=tokenizer)
    else:
        save_adapter(model, folder, tokenizer=tokenizer)
