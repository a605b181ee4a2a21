"""`meshift plan`: before anything is launched, the best plan for a run, how long a step takes, and what it needs.

It reads the config and the models' config.json only. It knows nothing of how plans are found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table
from rich.text import Text

from meshift.cli.check import commands_for, training_commands
from meshift.cli.command import Command, UsageError
from meshift.cli.tables import make_console, print_rows
from meshift.config.loading import load_config
from meshift.config.runs import RunConfig
from meshift.config.sections import TrainableConfig
from meshift.errors import ConfigError, ModelError
from meshift.models.config import DecoderConfig
from meshift.models.hf.families import read_config
from meshift.planner.explain import explanation, of_proof
from meshift.planner.hardware import Hardware, find_hardware
from meshift.planner.planning import Planned, make_plan, shortage
from meshift.planner.steps import Lengths, role_names, step_of
from meshift.planner.workload import ComputeType, Step
from meshift.planner.written import plan_values
from meshift.report.plan_page import plan_page
from meshift.yaml_values import apply_override, read_yaml

WHAT_IF = ("devices", "network", "batch", "completion")


class NothingFitsError(ConfigError):
    """The step fits on these devices in no way that the planner knows; what is short has been printed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be planned, with everything that a `--what-if` may change."""

    config: RunConfig
    step: Step
    hardware: Hardware
    num_devices: int
    seconds: float

    def plan(self) -> Planned:
        """The plan for it."""
        return make_plan(self.step, self.hardware, self.num_devices, seconds=self.seconds)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file of the run")
    parser.add_argument("--command", metavar="NAME", help="ppo, grpo, dpo, ...; default: told from the keys")
    parser.add_argument("--devices", type=int, metavar="N", required=True, help="devices to plan for")
    parser.add_argument(
        "--hardware", metavar="NAME", default="h100", help="a100, h100, h200, b200, cpu, or a JSON file"
    )
    parser.add_argument("--per-host", type=int, metavar="N", help="devices of a host (default: the hardware's)")
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="mean of prompts (default: half the limit)")
    parser.add_argument(
        "--completion-tokens", type=float, metavar="N", help="mean of completions (default: half the limit)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="time to search and prove (20)")
    parser.add_argument("--explain", action="store_true", help="say in sentences why the plan is what it is")
    parser.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="plan again with other devices, network (2x), batch or completion",
    )
    parser.add_argument("--out", metavar="FILE", help="write the plan: .yaml or .json for a run, .html to look at")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key, over what the file says")


def _run(args: argparse.Namespace) -> int:
    if args.devices < 1:
        raise UsageError(f"--devices {args.devices} is none; give at least 1")
    asked = _asked(args)
    variants = [variant for text in args.what_if for variant in _variants(text, asked, args)]
    planned = asked.plan()
    if planned.lacking > 0:
        for sentence in shortage(planned):
            print(f"  - {sentence}")
        print(f"what would fit: {'; or '.join(planned.changes)}")
        raise NothingFitsError(f"the step does not fit on {asked.num_devices} {asked.hardware.name}")
    show(planned)
    if args.explain:
        for sentence in explanation(planned):
            print(f"  {sentence}")
    if variants:
        _show_variants([("as it is", planned), *((name, one.plan()) for name, one in variants)])
    if args.out is not None:
        _write(Path(args.out), planned)
    return 0


def _asked(args: argparse.Namespace) -> Asked:
    commands = training_commands()
    values = read_yaml(Path(args.config))
    for override in args.overrides:
        apply_override(values, override)
    if args.command is not None and args.command not in commands:
        raise UsageError(f"--command {args.command} trains nothing; give one of {', '.join(commands)}")
    names = [args.command] if args.command else commands_for(values, args.config, commands)
    if len(names) > 1:
        raise UsageError(f"{args.config} could be of {' or '.join(names)}; say which with --command")
    config = load_config(commands[names[0]].schema, args.config, args.overrides)
    hardware = _hardware(args.hardware, config)
    if args.per_host is not None:
        hardware = replace(hardware, per_host=args.per_host)
    lengths = Lengths(prompt=args.prompt_tokens, completion=args.completion_tokens)
    step = _step(config, lengths)
    return Asked(config=config, step=step, hardware=hardware, num_devices=args.devices, seconds=args.seconds)


def _hardware(name: str, config: RunConfig) -> Hardware:
    """A known one, a profile's, or this machine's processors, for which torch is needed."""
    if name.lower() != "cpu":
        return find_hardware(name)
    from meshift.runtime.profiling.profile import named_hardware

    return named_hardware(name, (_dtype(config),))


def _dtype(config: RunConfig) -> ComputeType:
    return "float32" if config.dtype == "float32" else "bfloat16"


def _step(config: RunConfig, lengths: Lengths) -> Step:
    for name in ("actor", "critic", "model"):
        section = getattr(config, name, None)
        if isinstance(section, TrainableConfig) and section.lora is not None:
            raise ConfigError(
                f"the planner does not count adapters yet; plan without `{name}.lora`: it takes less"
            )
    models = {role: read_model(name) for role, name in role_names(config).items()}
    return step_of(config, models, _dtype(config), lengths)


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


def show(planned: Planned) -> None:
    """The plan as a table, what it gains over plans by hand, and how good it is at most."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("call", "layout", "devices", "begins, s", "takes, s", "memory, GB"):
        table.add_column(name, justify="left" if name in ("call", "layout", "devices") else "right")
    spots = {op.name: planned.choice[op.uses[0]] for op in planned.problem.ops if op.kind == "call"}
    for event in planned.events:
        spot = spots.get(event.name)
        if spot is None and event.end == event.start:
            continue
        placed = ("", "") if spot is None else (str(spot.candidate.layout), f"{spot.first}-{spot.stop - 1}")
        memory = f"{event.peak / 1e9:.1f}" if spot is not None else ""
        row = (event.name, *placed, f"{event.start:.2f}", f"{event.end - event.start:.2f}", memory)
        table.add_row(*map(Text, row))
    problem = planned.problem
    console = make_console()
    console.print(f"{problem.num_devices} {problem.hardware.name}, one step", style="bold", markup=False)
    console.print(table)
    print_rows(f"step {planned.seconds:.3g} s", [("proof", of_proof(planned)), *_rows_of_rivals(planned)])


def _rows_of_rivals(planned: Planned) -> Iterator[tuple[str, str]]:
    for rival in planned.rivals:
        if rival.seconds is None:
            yield rival.name, "not possible on so few devices"
        elif rival.lacking > 0:
            yield rival.name, f"does not fit: {rival.lacking / 1e9:.1f} GB too much on a device"
        else:
            yield (
                rival.name,
                f"{rival.seconds:.3g} s, {rival.seconds / planned.proof.seconds:.2f} times the plan's",
            )
    away = [role for role, plan in plan_values(planned.problem, planned.choice).items() if plan.get("offload")]
    if away:
        yield "offload", f"{', '.join(away)}: in the host's memory between calls, since else nothing fits"


def _variants(text: str, asked: Asked, args: argparse.Namespace) -> Iterator[tuple[str, Asked]]:
    """`devices=64,128` and the like, each value as what is then asked."""
    key, _, listed = text.partition("=")
    if key not in WHAT_IF or not listed:
        raise UsageError(f"--what-if {text}: write one of {', '.join(WHAT_IF)} with values, as devices=64,128")
    for value in listed.split(","):
        try:
            number = float(value.removesuffix("x"))
        except ValueError:
            raise UsageError(f"--what-if {text}: `{value}` is no number") from None
        yield f"{key}={value}", _changed(key, number, asked, args)


def _changed(key: str, number: float, asked: Asked, args: argparse.Namespace) -> Asked:
    if number <= 0:
        raise UsageError(f"--what-if {key}: {number:g} is not above 0")
    lengths = Lengths(prompt=args.prompt_tokens, completion=args.completion_tokens)
    changes: dict[str, Callable[[], dict[str, Any]]] = {
        "devices": lambda: {"num_devices": int(number)},
        "network": lambda: {"hardware": asked.hardware.changed(far_rate=number)},
        "batch": lambda: {"step": _step(_batched(asked.config, int(number)), lengths)},
        "completion": lambda: {"step": _step(asked.config, replace(lengths, completion=number))},
    }
    return replace(asked, **changes[key]())


def _batched(config: RunConfig, size: int) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"batch_size": size})})


def _show_variants(found: Sequence[tuple[str, Planned]]) -> None:
    rows = []
    for name, planned in found:
        if planned.lacking > 0:
            rows.append((name, f"does not fit: {planned.lacking / 1e9:.1f} GB too much on a device"))
            continue
        sequences = max(call.texts.num_sequences for call in planned.problem.step.calls)
        each = sequences / planned.seconds
        rows.append(
            (name, f"step {planned.seconds:.3g} s, {each:.3g} sequences a second, gap {planned.proof.gap:.1%}")
        )
    print_rows("what if", rows)


def _write(path: Path, planned: Planned) -> None:
    """The plan, in JSON with what was predicted, or as a page."""
    values: dict[str, Any] = {"plan": plan_values(planned.problem, planned.choice)}
    if path.suffix == ".json":
        values["predicted"] = {
            "step_s": planned.seconds,
            "bound_s": planned.proof.bound,
            "proven": planned.proof.proven,
            "events": [
                {"name": one.name, "start_s": one.start, "end_s": one.end, "peak_bytes": one.peak}
                for one in planned.events
            ],
        }
        text = json.dumps(values, indent=2)
    elif path.suffix == ".html":
        text = plan_page(planned)
    else:
        text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


PLAN = Command(
    name="plan",
    summary="find the best plan for a run on a cluster, and predict its step, without a GPU",
    description=(
        "Plan a run before it is launched, from its config and its models' config.json: where each call runs and\n"
        "in which layout, how long a step takes, what memory it needs, how far from the best plan it can be, and\n"
        "how it compares with plans by hand. Where nothing fits: what is short, and what would fit (exit code 2)."
    ),
    example="meshift plan --config run.yaml --devices 128 --hardware h100 --explain --out plan.yaml",
    configure=_configure,
    run=_run,
)
