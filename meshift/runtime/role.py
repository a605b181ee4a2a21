"""A role in this process: one decoder, its training engine and, for an actor, its generation engine.

In one process with one layout, generation reads the trainer's own tensors and nothing is copied. It knows nothing
of algorithms; `step.py` calls its verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from meshift.batch import Batch, Outcome
from meshift.config.sections import TrainableConfig
from meshift.errors import CheckpointError, NonFiniteError
from meshift.generation.engine import GenerationEngine
from meshift.generation.rollout import OnPart, SamplingTask, rollout
from meshift.models.adapters import MergedWeights
from meshift.models.config import HeadKind
from meshift.models.decoder import Decoder
from meshift.models.shards import VALUE_HEAD
from meshift.parallel.groups import Place
from meshift.runtime.models import open_model
from meshift.runtime.peak_rate import peak_rate
from meshift.runtime.staleness import Ages
from meshift.runtime.whole_model import dtype_of
from meshift.step import Role
from meshift.training.checkpoint import State, restore_tensor
from meshift.training.engine import TrainingEngine, TrainTask
from meshift.training.flops import Work
from meshift.training.offload import Offload, pays_on
from meshift.training.optimizer import learning_rate
from meshift.training.readings import Reading

AVERAGE = "average/"
"""Before a parameter's name in a role's state: what others were mixed into, in fp32."""
KEPT_CACHE_BYTES = 256 * 2**20
"""Key-value memory that a role may keep while its device does something else, as training. A larger one is
freed after every rollout: fresh pages then cost some tenths of a second a step, small beside such a rollout."""


def open_role(name: str, model: str, head: HeadKind, dtype: torch.dtype) -> LocalRole:
    """A role that only reads or generates, from a model's name."""
    return LocalRole(name, open_model(model, head, dtype), TrainableConfig())


class LocalRole:
    """Meets `step.Role` with one model on one device.

    A role that is trained too, or whose device has other calls, keeps at most `KEPT_CACHE_BYTES` of key-value
    memory after a rollout, and no copy of its weights. With a
    `place`, `model` is that rank's part, and each process of the placement gives its role the same calls with the
    same whole batch: all get the same whole outcome.
    """

    def __init__(
        self,
        name: str,
        model: Decoder,
        config: TrainableConfig,
        *,
        trainable: bool = False,
        max_steps: int = 1,
        seed: int = 0,
        place: Place | None = None,
        offload: bool = False,
    ) -> None:
        """With `offload`, all of the role is in the host's memory between calls, where that is another memory."""
        self.name = name
        self.model = model
        self.config = config
        self.max_steps = max_steps
        self.seed = seed
        self.trainer = TrainingEngine(model, config, trainable=trainable, name=name, place=place)
        self.generator: GenerationEngine | None = None
        self._lends = trainable
        self._ages = Ages(name)
        self._mixed: dict[str, torch.Tensor] = {}
        self._moved: set[str] = set()
        self._offload: Offload | None = None
        if offload and pays_on(model.device):
            self._offload = Offload(tensors=self._held, blanks=self._gradients)
            self.leave()

    @property
    def offload(self) -> Offload | None:
        """What moves the role between its device and the host, if anything does."""
        return self._offload

    def come(self) -> None:
        """Be on the device, until the next call ends."""
        if self._offload is not None:
            self._offload.come()

    def leave(self) -> None:
        """Leave the device, if the role is one that does."""
        if self._offload is not None:
            if self.generator is not None:
                self.generator.release()
            self._offload.leave()

    @contextmanager
    def _here(self) -> Iterator[None]:
        self.come()
        try:
            yield
        finally:
            self.leave()

    def _held(self) -> list[torch.Tensor]:
        optimizer = self.trainer.optimizer
        kept = [] if optimizer is None else optimizer.held()
        return [*self.model.parameters(), *kept, *self._mixed.values()]

    def _gradients(self) -> list[torch.Tensor]:
        return [] if self.trainer.optimizer is None else self.trainer.optimizer.gradients()

    @property
    def version(self) -> int:
        """Optimizer steps that the weights have seen."""
        return self.trainer.version

    @property
    def work(self) -> Work:
        """What training has computed so far, and in what time."""
        return self.trainer.work

    @property
    def peak_flops(self) -> float:
        """FLOP/s that the role's devices reach at best in the type that the model computes in, always the same."""
        ranks = self.trainer.ranks
        num_devices = 1 if ranks is None else ranks.place.layout.num_ranks
        return num_devices * peak_rate(self.model.device, self.model.dtype)

    @property
    def num_numbers(self) -> tuple[int, int]:
        """Numbers that are trained, and those that are not."""
        learns = self.trainer.optimizer is not None
        sizes = [(p.numel(), learns and p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, trained in sizes if trained), sum(n for n, trained in sizes if not trained)

    def can_generate(
        self, num_slots: int, decode: Callable[[list[int]], str], *, lends: bool = False
    ) -> LocalRole:
        """Give the role a generation engine over its own weights.

        `lends`: other calls run on its device before the next rollout, and have the memory of this one.
        """
        self._lends = self._lends or lends
        stages = None if self.trainer.ranks is None else self.trainer.ranks.stages
        self.generator = GenerationEngine(self.model, num_slots=num_slots, decode=decode, stages=stages)
        return self

    def generate(self, task: SamplingTask, batch: Batch, on_part: OnPart | None = None) -> Outcome:
        """Sample completions; `perf/generated_tokens` counts them.

        `on_part` gets this process's rows as they end, by their numbers in the batch.
        """
        assert self.generator is not None, f"role {self.name} has no generation engine"
        with self._here():
            completed = self._rollout(self.generator, task, batch, on_part)
        if self._lends or self.trainer.passes.is_sharded:
            self.generator.release_weights()  # an update will change them, or only some rows are to be kept here
        if self._lends and self.generator.num_kept_bytes > KEPT_CACHE_BYTES:
            self.generator.release()
        num_tokens = int(completed["completion_lengths"].values.sum())
        return Outcome(batch=completed, metrics={"perf/generated_tokens": num_tokens})

    def _rollout(
        self, generator: GenerationEngine, task: SamplingTask, batch: Batch, on_part: OnPart | None
    ) -> Batch:
        ranks = self.trainer.ranks
        if ranks is None:
            return rollout(generator, task, batch, self.version, on_part=on_part)
        rows = ranks.neighbours(len(batch))

        def pass_on(numbers: list[int], part: Batch) -> None:
            assert on_part is not None
            on_part([rows[number] for number in numbers], part)

        given = None if on_part is None else pass_on
        with self.trainer.passes.gathered():  # data ranks sample alone, each at its own pace
            own = rollout(generator, task, batch.index(rows), self.version, on_part=given) if rows else Batch({})
        return ranks.joined(own)

    def infer(self, task: Reading, batch: Batch) -> Outcome:
        """Read without gradients."""
        with self._here():
            return Outcome(batch=self.trainer.infer(task, batch))

    def train(self, task: TrainTask, batch: Batch, *, step: int) -> Outcome:
        """Update. Raises `StaleWeightsError` if other weights drew the batch than the task allows.

        Of a step without any update there is no `grad_norm`. `skipped_updates` counts those that would have taught
        nothing, where there were any.
        """
        ages: dict[str, float] = {}
        if "versions" in batch:
            ages = self._ages.check(batch["versions"].values, self.version, task.max_staleness)
        rate = learning_rate(self.config, step, self.max_steps)
        try:
            with self._here():
                updates = self.trainer.train(task, batch, rate=rate, seed=self.seed + 1_000_003 * step)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {step + 1}: {error}") from None
        metrics = {**task.loss.summarise(updates), **ages}
        # The rate stands beside the gradient's norm: `actor/lr` in PPO, `lr` where one model is trained.
        prefix = f"{self.name}/" if f"{self.name}/grad_norm" in metrics else ""
        metrics[f"{prefix}lr"] = rate
        skipped = sum(stats.get("skipped", 0.0) for stats in updates)
        if skipped:
            metrics[f"{prefix}skipped_updates"] = skipped
        if not any("grad_norm" in stats for stats in updates):
            metrics.pop(f"{prefix}grad_norm", None)  # nothing was measured, which is no NaN
        if self.generator is not None:
            metrics["sync/version"] = self.version
        return Outcome(metrics=metrics)

    def whole(self) -> Decoder:
        """The model, to be saved."""
        self.come()
        return self.model

    def master_weights(self) -> Mapping[str, torch.Tensor]:
        """Every parameter by name, the trained ones from their fp32 masters; on the device until the next call.

        Adapters are in the matrices that they are beside.
        """
        self.come()
        weights, adapter = self.trainer.master_weights(), self.model.config.adapter
        return weights if adapter is None else MergedWeights(weights, adapter)

    @torch.no_grad()
    def mix(self, source: Role, rate: float) -> None:
        """`self <- rate * source + (1 - rate) * self`, exact in fp32 and rounded into the model once."""
        weights = source.master_weights()
        mixed = [name for name in weights if name != VALUE_HEAD]
        for name, average in self.averages(mixed).items():
            average.lerp_(weights[name].to(average), rate)
        self.settle_averages()
        self.leave()
        if isinstance(source, LocalRole):
            source.leave()

    def averages(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Of these parameters what is mixed into, in fp32: in place where the model is in fp32, else a copy.

        A slow average in bfloat16 would never move: an update of 0.1 % is below its resolution.
        """
        self.come()
        own = {name: p.detach() for name, p in self.model.named_parameters()}
        for name in names:
            self._moved.add(name)
            if own[name].dtype != torch.float32 and name not in self._mixed:
                self._mixed[name] = own[name].float()
        return {name: self._mixed.get(name, own[name]) for name in names}

    @torch.no_grad()
    def settle_averages(self) -> None:
        """Round what was mixed into the model."""
        own = dict(self.model.named_parameters())
        for name, average in self._mixed.items():
            own[name].copy_(average)

    def state(self) -> State:
        """What a checkpoint keeps: weights that moved, in fp32, and the optimizer. Not copies."""
        self.come()
        own = dict(self.model.named_parameters())
        averages = {f"{AVERAGE}{name}": self._mixed.get(name, own[name]) for name in sorted(self._moved)}
        trained = self.trainer.state()
        values = {**trained.values, "compute_type": dtype_of(self.model)}
        return State(tensors={**trained.tensors, **averages}, values={**values, **self._ages.values()})

    @torch.no_grad()
    def load_state(self, state: State) -> None:
        """Continue from a checkpoint. Raises `CheckpointError` where it is of another model or compute type."""
        self.come()
        if state.values["compute_type"] != dtype_of(self.model):
            raise CheckpointError(
                f"the {self.name} computed in {state.values['compute_type']}, and here `dtype` makes it "
                f"{dtype_of(self.model)}; set dtype={state.values['compute_type']} to go on as the run began"
            )
        self.trainer.load_state(state)
        self._ages.load(state.values)
        averages = {name.removeprefix(AVERAGE) for name in state.tensors if name.startswith(AVERAGE)}
        for name, own in self.model.named_parameters():
            if name not in averages:
                continue
            self._moved.add(name)
            if own.dtype != torch.float32:
                self._mixed[name] = own.detach().float()
            restore_tensor(self._mixed.get(name, own), state.tensors, f"{AVERAGE}{name}")
            own.copy_(self._mixed.get(name, own))

    def fixed_weights(self) -> dict[str, torch.Tensor]:
        """The parameters that are as the model was loaded: not trained, and not mixed so far."""
        self.come()
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if name not in self._moved and not (self.trainer.optimizer is not None and parameter.requires_grad)
        }
