"""What `meshift plan` is asked: a config's step on so many devices, and the same with one thing changed.

It reads the config, the models' config.json, and the first rows of data that is here already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from meshift.cli.command import UsageError
from meshift.cli.progress import RichObserver
from meshift.cli.tables import make_console
from meshift.cli.waiting import Waiting
from meshift.config.loading import make_config
from meshift.config.runs import RolloutRunConfig, RunConfig
from meshift.counted import heard_by
from meshift.data.names import parse_name
from meshift.errors import ConfigError, DataError, ModelError
from meshift.models.config import DecoderConfig
from meshift.models.hf.families import read_config
from meshift.planner.figures import figure
from meshift.planner.hardware import Hardware, find_hardware
from meshift.planner.planning import Planned, make_plan
from meshift.planner.rollout_steps import Lengths
from meshift.planner.steps import in_one_process, role_names, step_of
from meshift.planner.variants import AS_IT_IS, Variant, head, table_rows
from meshift.planner.workload import ComputeType, Step

if TYPE_CHECKING:
    from meshift.runtime.data_lengths import DataLengths

PROMPT, COMPLETION = "prompt-tokens", "completion-tokens"
EXPECTED = "plan.auto.completion_tokens"
WHAT_IF = ("devices", "network", "batch", "prompt", "completion")
WHOLE = ("devices", "batch")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be planned, with all that `--what-if` may change. `factors` are a run's (`--measured`)."""

    config: RunConfig
    lengths: TakenLengths
    hardware: Hardware
    num_devices: int
    seconds: float
    factors: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> Step:
        """The step that is planned."""
        dtype = compute_type(self.config, self.hardware)
        step = planned_step(self.config, self.lengths.means, dtype).as_measured(self.factors)
        return in_one_process(self.config, step) if self.num_devices == 1 else step

    def plan(self, known: Sequence[Planned] = ()) -> Planned:
        """The plan for it, no slower than `known` ones of other requests where these can be carried over."""
        on = f"{self.num_devices} {self.hardware.name}"
        with Waiting(f"seconds of the search for a plan on {on}", self.seconds):
            return make_plan(
                self.step,
                self.hardware,
                self.num_devices,
                seconds=self.seconds,
                streaming=self.config.launch.stream,
                known=known,
            )


def compute_type(config: RunConfig, hardware: Hardware) -> ComputeType:
    """bfloat16 where the config leaves it open: the cluster has it, whatever this machine has.

    But float32 where that is all that the hardware was measured in: what `auto` is on it.
    """
    if config.dtype == "auto" and hardware.profile is not None and not hardware.flops["bfloat16"]:
        return "float32"
    return "float32" if config.dtype == "float32" else "bfloat16"


def of_compute_type(config: RunConfig, hardware: Hardware) -> list[str]:
    """A sentence where the type is neither the config's nor what clusters have."""
    if config.dtype != "auto" or compute_type(config, hardware) == "bfloat16":
        return []
    return [f"All figures are in float32, which is all that {hardware.name} was measured in."]


def read_hardware(name: str, config: RunConfig) -> Hardware:
    """A known one, a profile's, or this machine's processors, for which torch is needed."""
    if name.lower() != "cpu":
        return find_hardware(name)
    from meshift.runtime.outlook import dtype_name
    from meshift.runtime.profiling.profile import named_hardware

    with RichObserver() as observer, heard_by(observer.on_count):
        return named_hardware(name, (dtype_name(config),), observer)


def planned_step(config: RunConfig, lengths: Lengths, dtype: ComputeType) -> Step:
    """The step of a config, of which the models' config.json are read."""
    models = {role: read_model(name) for role, name in role_names(config).items()}
    return step_of(config, models, dtype, lengths).with_offloaded(config.plan.offloaded)


@dataclass(frozen=True, kw_only=True)
class TakenLengths:
    """Means of texts (None: the step's own assumption), and for each where it comes from."""

    means: Lengths
    prompt: str
    completion: str

    def in_words(self, step: Step) -> str:
        """What a step's texts are taken to be, and why."""
        texts = step.calls[0].texts
        return (
            f"Prompts of {figure(texts.prompt, 4)} tokens in the mean: {self.prompt}; completions of "
            f"{figure(texts.completion, 4)}: {self.completion}."
        )


def taken_lengths(config: RunConfig, prompt: float | None, completion: float | None) -> TakenLengths:
    """What is said with options, else what the data has, where it can be read here at once."""
    found = None
    if prompt is None or (completion is None and not isinstance(config, RolloutRunConfig)):
        found = _of_data(config)
    read = Lengths() if found is None else found.lengths

    def source(option: str, given: float | None, of_data: float | None) -> str:
        if given is not None:
            return f"--{option}"
        if option == COMPLETION and _is_fixed(config):
            return "the config has them all so long"
        if found is None or of_data is None:
            return f"assumed; --{option} sets it"
        return found.told if option == PROMPT or not isinstance(config, RolloutRunConfig) else EXPECTED

    return TakenLengths(
        means=Lengths(prompt=prompt or read.prompt, completion=completion or read.completion),
        prompt=source(PROMPT, prompt, read.prompt),
        completion=source(COMPLETION, completion, read.completion),
    )


def _is_fixed(config: RunConfig) -> bool:
    """Whether no completion may end before its limit."""
    if not isinstance(config, RolloutRunConfig):
        return False
    return config.generation.min_new_tokens >= config.generation.max_completion_length


def check_lengths(asked: Asked, prompt: str, completion: str) -> None:
    """Raise `UsageError` for means beyond the config's limits. `prompt` and `completion` say who asked."""
    drawn, means = isinstance(asked.config, RolloutRunConfig), asked.lengths.means
    shorter = replace(asked, lengths=_with_means(asked.lengths, prompt=None) if drawn else asked.lengths)
    texts = shorter.step.calls[0].texts
    for who, mean, limit in (
        (prompt, means.prompt if drawn else None, texts.longest_prompt),
        (completion, means.completion, texts.longest_completion),
    ):
        if mean is not None and mean > limit:
            raise UsageError(
                f"{who}: a mean of {figure(mean, 4)} tokens, where the config has at most {limit}; raise that"
            )


def as_assumed(asked: Asked, step: Step) -> dict[str, Any]:
    """What a plan rests on besides the config, for its file."""
    texts = step.calls[0].texts
    return {
        "devices": asked.num_devices,
        "hardware": asked.hardware.name,
        "prompt_tokens": texts.prompt,
        "completion_tokens": texts.completion,
    }


def of_network(texts: Sequence[str], asked: Asked) -> list[str]:
    """Why another network between hosts changes nothing, where it is asked for and does not."""
    if asked.num_devices > asked.hardware.per_host or not any(text.startswith("network") for text in texts):
        return []
    where = f"all {asked.num_devices} devices are on one host of {asked.hardware.per_host}"
    return [f"The network between hosts carries nothing here: {where}."]


def _of_data(config: RunConfig) -> DataLengths | None:
    """None where there is no data here, or nothing to read it with: then torch is not imported either."""
    try:
        name = parse_name(config.data.dataset_name)
        if not name.is_package and (name.path is None or not name.path.exists()):
            return None
        from meshift.runtime.data_lengths import lengths_here
    except (DataError, ImportError):
        return None
    return lengths_here(config)


def read_model(name: str) -> DecoderConfig:
    """A model's numbers from its config.json: of a folder, or of what `pypi:` and hub names stand for."""
    folder = Path(name)
    if not (folder / "config.json").is_file():
        from meshift.runtime.models import model_folder

        folder = model_folder(name)
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); the planner needs it") from None
    return read_config(raw, str(path))


def variants_of(texts: Sequence[str], asked: Asked, planned: Planned) -> list[list[Variant]]:
    """For each `--what-if KEY=A,B`: the plan as it is, and with every value of the key, in order.

    Each begins from the plan as it is and from that of the value before, so it is no slower than these there.
    """
    variants = []
    for key, found in (_requests(text, asked) for text in texts):
        rows = [Variant(key=key, value=AS_IT_IS, number=_number_as_it_is(key, asked), planned=planned)]
        for value, number, one in found:
            known = [planned] if len(rows) == 1 else [planned, rows[-1].planned]
            rows.append(Variant(key=key, value=value, number=number, planned=one.plan(known)))
        variants.append(rows)
    return variants


def check_variants(texts: Sequence[str], asked: Asked) -> None:
    """Raise `UsageError` for one that cannot be read, before anything is planned."""
    for text in texts:
        _requests(text, asked)


def _requests(text: str, asked: Asked) -> tuple[str, list[tuple[str, float, Asked]]]:
    """`devices=64,128` and the like, each value as what is then asked."""
    key, _, listed = text.partition("=")
    if key not in WHAT_IF or not listed:
        raise UsageError(f"--what-if {text}: write one of {', '.join(WHAT_IF)} with values, as devices=64,128")
    found = []
    for value in listed.split(","):
        try:
            number = float(value.removesuffix("x"))
        except ValueError:
            raise UsageError(f"--what-if {text}: `{value}` is no number") from None
        if not (isfinite(number) and number > 0):
            raise UsageError(f"--what-if {key}: {value} is no number above 0")
        if key in WHOLE and number != int(number):
            raise UsageError(f"--what-if {key}: {value} is no whole number")
        changed = _changed(key, number, asked)
        if key in ("prompt", "completion"):
            check_lengths(changed, f"--what-if {text}", f"--what-if {text}")
        found.append((value, number, changed))
    return key, found


def _changed(key: str, number: float, asked: Asked) -> Asked:
    changes: dict[str, Callable[[], dict[str, Any]]] = {
        "devices": lambda: {"num_devices": int(number)},
        "network": lambda: {"hardware": asked.hardware.changed(far_rate=number)},
        "batch": lambda: {"config": _batched(asked.config, int(number))},
        "prompt": lambda: {"lengths": _with_means(asked.lengths, prompt=number)},
        "completion": lambda: {"lengths": _with_means(asked.lengths, completion=number)},
    }
    return replace(asked, **changes[key]())


def _with_means(lengths: TakenLengths, **means: float | None) -> TakenLengths:
    return replace(lengths, means=replace(lengths.means, **means))


def _number_as_it_is(key: str, asked: Asked) -> float:
    if key == "devices":
        return float(asked.num_devices)
    if key == "batch":
        return float(asked.config.data.batch_size)
    if key in ("prompt", "completion"):
        texts = asked.step.calls[0].texts
        return texts.prompt if key == "prompt" else texts.completion
    return 1.0


def _batched(config: RunConfig, size: int) -> RunConfig:
    """Raises `UsageError` where the config's other keys forbid it."""
    values = config.model_dump(mode="json", exclude_unset=True)
    values["data"] = {**values.get("data", {}), "batch_size": size}
    try:
        return make_config(type(config), values, f"--what-if batch={size}")
    except ConfigError as error:
        raise UsageError(str(error)) from None


def show_variants(variants: Sequence[list[Variant]]) -> None:
    """A table for each key."""
    console = make_console()
    for found in variants:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(head(found[0].key)):
            table.add_column(name, justify="right" if i else "left")
        for row in table_rows(found):
            table.add_row(*map(Text, row))
        console.print(f"what if: {found[0].key}", style="bold", markup=False)
        console.print(table)
