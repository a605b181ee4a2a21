"""Where a run goes on: what its folder holds, and whether the config of today may continue it.

It knows nothing of models. The rules: a whole checkpoint is gone on from; a run that has none yet begins again; a
finished run stays as it is; and a config that would give another run than the one begun is refused, by key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from meshift.config.loading import load_config, make_config
from meshift.config.runs import RunConfig
from meshift.config.section import Section
from meshift.config.sections import TrainableConfig
from meshift.errors import CheckpointError, ConfigError
from meshift.runtime.checkpoints import Checkpoint, find_checkpoint
from meshift.runtime.run_folder import CONFIG, FINAL, METRICS, worth_keeping, written_by_run
from meshift.yaml_values import read_yaml

C = TypeVar("C", bound=RunConfig)

FREE = frozenset(
    {
        *("output_dir", "overwrite_output_dir", "resume", "report_to", "num_logged_samples"),
        *("save_steps", "save_total_limit", "eval_steps", "num_report_prompts", "report_samples_every"),
        *("max_restarts", "heartbeat_timeout_s", "hang_timeout_s"),
        *("launcher", "ray_address", "ray_wait_s", "hardware"),
        "save_merged",
        *("timeout_s", "on_error"),  # of a reward function: what happens where the run would have ended before
    }
)
"""Last parts of keys that change nothing about the trained model."""
OTHER_BITS = "may differ in its last bits from one that was never broken off"
LENGTH = frozenset({"max_steps", "num_train_epochs"})
"""How long the run is; `check_length` says when that may change."""
LAST_BITS = frozenset(
    {
        "num_threads",
        "max_tokens_per_micro_batch",
        "logits_chunk",
        "gradient_checkpointing",
        "share_prefixes",
        *("stream", "stream_size"),
        "num_slots",
    }
)
"""Memory and speed: they change the order of sums, and with it the last bits of the result."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins: at its first step, after a checkpoint, or not at all, because it is finished."""

    checkpoint: Checkpoint | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()

    @property
    def num_done(self) -> int:
        """Steps that need not be run again."""
        return self.checkpoint.step if self.checkpoint is not None else 0


def find_start(config: RunConfig) -> Start:
    """Where the run in `output_dir` goes on.

    Raises `ConfigError` where the folder is of another run or of none, naming the key that differs, and
    `CheckpointError` where there are checkpoints but none is whole.
    """
    run = Path(config.output_dir)
    kept = worth_keeping(run)
    if kept is None:
        return Start(notes=(f"there is nothing to resume in {run}; the run starts at its first step",))
    if not written_by_run(run / CONFIG):
        raise ConfigError(
            f"cannot resume in {run}: it holds {kept}, but no {CONFIG} that a run wrote; name the folder of a run"
        )
    if (run / FINAL).is_dir():
        return _finished(config, _begun(config, run), run)
    found = find_checkpoint(run)
    if found.checkpoint is None:
        return _from_the_beginning(config, _begun(config, run), found.broken)
    checkpoint = found.checkpoint
    name = checkpoint.folder.name
    passed_over = tuple(f"{broken}; going on from {name} instead" for broken in found.broken)
    changed = check_same_run(_stored_config(config, checkpoint), config, str(checkpoint.folder))
    lost = _lost_lines(run / METRICS, checkpoint.step)
    notes = (*passed_over, *changed, *lost, f"going on after step {checkpoint.step}, from {name}")
    return Start(checkpoint=checkpoint, notes=notes)


def _begun(config: C, run: Path) -> C:
    """The config that the run in a folder was begun with."""
    try:
        return load_config(type(config), run / CONFIG)
    except ConfigError as error:
        raise ConfigError(
            f"cannot resume in {run}: its {CONFIG} is of no {_method(config)} run "
            f"({error}); use the command that the run began with, or name another output_dir"
        ) from None


def _method(config: RunConfig) -> str:
    """`PPORunConfig` -> `PPO`."""
    return type(config).__name__.removesuffix("RunConfig")


def _lost_lines(metrics: Path, num_done: int) -> tuple[str, ...]:
    """A note where metrics of steps that are done are gone: no run that goes on writes them again."""
    written = {row.get("training/global_step") for row in _rows(metrics)}
    lost = [step for step in range(1, num_done + 1) if step not in written]
    if not lost:
        return ()
    return (
        f"{metrics} lacks {len(lost)} of the {num_done} steps that are done (step {lost[0]} ...); it stays so",
    )


def _rows(metrics: Path) -> Iterator[dict[str, Any]]:
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def _finished(config: RunConfig, begun: RunConfig, run: Path) -> Start:
    check_same_run(begun, config, str(run))
    if any(getattr(begun, key) != getattr(config, key) for key in LENGTH):
        raise ConfigError(
            f"the run in {run} is finished, and cannot be made longer or shorter; start a new one, "
            f"in another output_dir, from {run / FINAL}"
        )
    return Start(finished=True, notes=(f"the run in {run} is finished; there is nothing left to do",))


def _from_the_beginning(config: RunConfig, begun: RunConfig, broken: list[str]) -> Start:
    if broken:
        raise CheckpointError(
            f"no checkpoint in {config.output_dir} is whole: {'; '.join(broken)}. Restore one, or start the run "
            "again with overwrite_output_dir=true and without --resume"
        )
    changed = check_same_run(begun, config, config.output_dir)
    note = f"{config.output_dir} has no checkpoint yet; the run starts again at its first step"
    return Start(notes=(*changed, note))


def _stored_config(config: C, checkpoint: Checkpoint) -> C:
    kind = checkpoint.facts["run"]
    if kind != type(config).__name__:
        raise ConfigError(
            f"{checkpoint.folder} is of a run by {kind.removesuffix('RunConfig')}, and this one is by "
            f"{_method(config)}; use the command that the run began with, or name another output_dir"
        )
    return make_config(type(config), checkpoint.facts["config"], where=str(checkpoint.folder))


def check_same_run(begun: RunConfig, config: RunConfig, where: str) -> tuple[str, ...]:
    """Notes on what has changed since; raises `ConfigError`, naming key and values, where that may not change."""
    before, now = dict(_flat(begun.model_dump(mode="json"))), dict(_flat(config.model_dump(mode="json")))
    notes = []
    if begun.plan != config.plan:
        notes.append(f"`plan` is another than in {where}: the run {OTHER_BITS}")
    for key in sorted(before.keys() | now.keys()):
        leaf = key.rsplit(".", 1)[-1]
        if before.get(key) == now.get(key) or leaf in FREE | LENGTH or key.startswith("plan."):
            continue
        change = f"`{key}` was {json.dumps(before.get(key))} in {where} and is {json.dumps(now.get(key))} now"
        if leaf not in LAST_BITS:
            raise ConfigError(f"{change}: a resumed run must be the same run; set it back, or start a new run")
        notes.append(f"{change}: the run {OTHER_BITS}")
    return tuple(notes)


def replaced(config: RunConfig) -> tuple[str, ...]:
    """A note where a new run will delete a finished one that was another run: its config differs in more than what
    changes nothing about the model. A run that is repeated replaces itself without one."""
    run = Path(config.output_dir)
    if config.resume or not (run / FINAL).is_dir() or not written_by_run(run / CONFIG):
        return ()
    with suppress(ConfigError):
        before, now = dict(_flat(read_yaml(run / CONFIG))), dict(_flat(config.model_dump(mode="json")))
        changed = [key for key in [*now, *before] if before.get(key) != now.get(key)]
        named = [key.partition(".")[0] if key.startswith("plan.") else key for key in changed]
        others = list(dict.fromkeys(key for key in named if key.rsplit(".", 1)[-1] not in FREE))
        if not others:
            return ()
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return (
            f"{run} holds a finished run with another `{others[0]}`{more}, which overwrite_output_dir deletes as "
            "this one begins; to keep both, end this one and give it an output_dir of its own",
        )
    return ()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value under its dotted key; of lists of sections as `functions[0].weight`."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            for number, item in enumerate(value):
                yield from _flat(item, f"{prefix}{name}[{number}].")
        else:
            yield f"{prefix}{name}", value


def check_length(config: RunConfig, checkpoint: Checkpoint, max_steps: int) -> None:
    """Raise `ConfigError` unless a run of that many steps can go on from the checkpoint.

    A run may be made longer or shorter where its learning rates do not depend on its length, and it may be
    ended where it stands.
    """
    before = checkpoint.facts["max_steps"]
    if max_steps < checkpoint.step:
        raise ConfigError(f"the run is to have {max_steps} steps, but {checkpoint.folder} is after more")
    if max_steps in (before, checkpoint.step):
        return
    ahead = getattr(config, "max_staleness", 0)
    if max_steps > before and checkpoint.step + ahead > before:
        raise ConfigError(
            f"the run was to have {before} steps, and {checkpoint.folder} lacks completions of later ones, which "
            f"`max_staleness` = {ahead} would have had drawn by then; keep the number of steps"
        )
    for key in _decaying(config):
        raise ConfigError(
            f"the run had {before} steps and is to have {max_steps} now, but `{key}` spreads the learning rate "
            "over all steps, and those that are done had another rate; keep the number of steps"
        )


def _decaying(section: Section, prefix: str = "") -> Iterator[str]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, TrainableConfig) and value.lr_scheduler_type != "constant":
            yield f"{prefix}{name}.lr_scheduler_type"


def check_environment(checkpoint: Checkpoint, now: Mapping[str, str]) -> tuple[str, ...]:
    """One note for each thing outside the config that the last bits depend on and that is another now."""
    before = checkpoint.facts["environment"]
    return tuple(
        f"{key} was {before.get(key)} when {checkpoint.folder.name} was written and is {value} now: the run "
        f"{OTHER_BITS}"
        for key, value in now.items()
        if before.get(key) != value
    )


def last_metrics(run: Path) -> dict[str, Any]:
    """The metrics of the last step that a run has written; nothing where there are none."""
    last: dict[str, Any] = {}
    for row in _rows(run / METRICS):
        last = row
    return {key: value for key, value in last.items() if value is not None}
