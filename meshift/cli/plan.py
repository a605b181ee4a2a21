"""`meshift plan`: before anything is launched, the best plan for a run, how long a step takes, and what it needs.

It reads the config, the models' config.json and a few rows of data that is here. It knows nothing of how plans are
found.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.table import Table
from rich.text import Text

from meshift.cli.command import Command, UsageError
from meshift.cli.numbers import above_zero, whole
from meshift.cli.plan_request import (
    Asked,
    as_assumed,
    check_lengths,
    check_variants,
    of_compute_type,
    of_network,
    read_hardware,
    show_variants,
    taken_lengths,
    variants_of,
)
from meshift.cli.tables import make_console, print_rows
from meshift.cli.which_command import commands_for, training_commands
from meshift.config.loading import load_config, read_values
from meshift.errors import ConfigError
from meshift.planner.explain import explanation, of_proof, of_rivals
from meshift.planner.figures import figure
from meshift.planner.hardware import Hardware, as_values
from meshift.planner.planning import Planned
from meshift.planner.shortage import shortage
from meshift.planner.simulate import in_sentences, simulate
from meshift.planner.written import devices_of, named_hosts, num_idle, placements_of
from meshift.report.numbers import duration
from meshift.report.plan_page import plan_page
from meshift.report.reconciled import factors, host_seconds
from meshift.report.run_data import read_run

WRITTEN = (".yaml", ".yml", ".json", ".html")
"""Suffixes of `--out`."""
HOST_CALLS = (
    "What process 0 does between calls (reward functions, sandboxes, judges) is not in the step's seconds."
)
SIMULATED = 20
"""Steps with random lengths that `--explain` plays."""


class NothingFitsError(ConfigError):
    """The step fits on these devices in no way that the planner knows; what is short has been printed."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", required=True, help="YAML file of the run")
    parser.add_argument("--command", metavar="NAME", help="ppo, grpo, dpo, ...; default: told from the keys")
    parser.add_argument("--devices", type=whole(1), metavar="N", required=True, help="devices to plan for")
    parser.add_argument(
        "--hardware", metavar="NAME", default="h100", help="a100, h100, h200, b200, cpu, or a JSON file"
    )
    parser.add_argument(
        "--per-host", type=whole(1), metavar="N", help="devices of a host (default: the hardware's)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=above_zero,
        metavar="N",
        help="mean of prompts (default: the data's; else half the limit)",
    )
    parser.add_argument(
        "--completion-tokens", type=above_zero, metavar="N", help="mean of completions (default: half the limit)"
    )
    parser.add_argument(
        "--seconds", type=above_zero, default=20.0, metavar="S", help="time to search and prove (20)"
    )
    parser.add_argument("--explain", action="store_true", help="say in sentences why the plan is what it is")
    parser.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="plan again with other devices, network (2x), batch, prompt or completion",
    )
    parser.add_argument(
        "--simulate", type=whole(0), metavar="N", help="play N steps with random lengths (--explain: 20 of them)"
    )
    parser.add_argument(
        "--measured",
        metavar="RUN",
        help="a run's folder: scale each call as it measured it against its prediction",
    )
    parser.add_argument("--hosts", metavar="A,B", help="names of the hosts, for a plan over several of them")
    parser.add_argument("--out", metavar="FILE", help="write the plan: .yaml or .json for a run, .html to look at")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="set a key, over what the file says")


def _run(args: argparse.Namespace) -> int:
    if args.out is not None and Path(args.out).suffix not in WRITTEN:
        raise UsageError(f"--out {args.out}: its suffix says what is written; give it one of {', '.join(WRITTEN)}")
    asked = _asked(args)
    check_lengths(asked, "--prompt-tokens", "--completion-tokens")
    check_variants(args.what_if, asked)
    planned = asked.plan()
    if planned.lacking > 0:
        for sentence in shortage(planned):
            print(f"  - {sentence}")
        print(f"what would fit: {'; or '.join(planned.changes) or 'smaller models, or more memory'}")
        raise NothingFitsError(f"the step does not fit on {asked.num_devices} {asked.hardware.name}")
    show(planned)
    print(f"  {asked.lengths.in_words(planned.step)}")
    if any(call.kind == "generate" for call in planned.step.calls):
        print(f"  {HOST_CALLS}{_by_measurement(args)}")
    more = [*_simulated(planned, args), *_advice(planned), *of_network(args.what_if, asked)]
    more += of_compute_type(asked.config, asked.hardware)
    for sentence in (*(explanation(planned) if args.explain else ()), *more):
        print(f"  {sentence}")
    variants = variants_of(args.what_if, asked, planned)
    show_variants(variants)
    if args.out is not None:
        _write(Path(args.out), asked, planned, _hosts(args, planned), partial(plan_page, planned, variants, more))
        print(f"written to {args.out}")
    return 0


def _by_measurement(args: argparse.Namespace) -> str:
    """How long that took where a run has measured it."""
    found = {} if args.measured is None else host_seconds(read_run(Path(args.measured)))
    if not found:
        return ""
    most = max(found, key=lambda name: found[name])
    return f" There it took {duration(sum(found.values()))} a step, most of it in {most}; add that to every plan."


def _simulated(planned: Planned, args: argparse.Namespace) -> list[str]:
    """Sentences on steps with random lengths, where they are asked for."""
    num_steps = args.simulate or (SIMULATED if args.explain else 0)
    if num_steps == 0:
        return []
    problem = planned.problem
    placements = placements_of(problem, planned.choice)
    streaming = problem.streaming
    found = simulate(planned.step, problem.hardware, placements, num_steps=num_steps, streaming=streaming)
    return [] if found is None else list(in_sentences(found))


def _advice(planned: Planned) -> Iterator[str]:
    """Slots and micro-batches that the plan sets."""
    if planned.settings:
        listed = ", ".join(map(str, planned.settings))
        yield f"All figures are with {listed}, in place of the config's; --out writes them too."


def _hosts(args: argparse.Namespace, planned: Planned) -> list[str]:
    """The names that are given, as many as the plan has hosts; none where none are."""
    if args.hosts is None:
        return []
    names = [name.strip() for name in args.hosts.split(",")]
    per_host = planned.problem.hardware.per_host
    needed = -(-planned.problem.num_devices // per_host)
    if len(set(names)) != len(names) or len(names) < needed or not all(names):
        raise UsageError(
            f"--hosts {args.hosts}: {planned.problem.num_devices} devices, {per_host} to a host, are on {needed} "
            "hosts; give as many different names"
        )
    return names


def _asked(args: argparse.Namespace) -> Asked:
    commands = training_commands()
    values = read_values(args.config, args.overrides)
    if args.command is not None and args.command not in commands:
        raise UsageError(f"--command {args.command} trains nothing; give one of {', '.join(commands)}")
    names = [args.command] if args.command else commands_for(values, args.config, commands)
    if len(names) > 1:
        raise UsageError(f"{args.config} could be of {' or '.join(names)}; say which with --command")
    config = load_config(commands[names[0]].schema, args.config, args.overrides)
    hardware = read_hardware(args.hardware, config)
    if args.per_host is not None:
        hardware = replace(hardware, per_host=args.per_host)
    return Asked(
        config=config,
        lengths=taken_lengths(config, args.prompt_tokens, args.completion_tokens),
        hardware=hardware,
        num_devices=args.devices,
        seconds=args.seconds,
        factors={} if args.measured is None else _factors(Path(args.measured), hardware),
    )


def _factors(folder: Path, hardware: Hardware) -> dict[str, float]:
    """How many times as long as predicted each call of a run took. Raises `InputError` where that is not known.

    Nor is it of another device than the one that its prediction was for.
    """
    run = read_run(folder)
    found, told = factors(run), run.plan.get("hardware")
    name = told.get("name") if isinstance(told, dict) else None
    if found and name != hardware.name:
        raise UsageError(
            f"--measured {folder}: what that run was predicted on is `{name}`, and this plan is for "
            f"`{hardware.name}`; how far a prediction was off on one says nothing of the other"
        )
    if not found:
        raise UsageError(
            f"--measured {folder}: the run has no plan.json with a prediction, or no step that is done"
        )
    return found


def show(planned: Planned) -> None:
    """The plan as a table, what it gains over plans by hand, and how good it is at most."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("call", "layout", "devices", "begins, s", "takes, s", "memory, GB"):
        table.add_column(name, justify="left" if name in ("call", "layout", "devices") else "right")
    uses = {op.name: op.uses[0] for op in planned.problem.ops if op.kind == "call"}
    devices = devices_of(planned.problem, planned.choice)
    for event in planned.events:
        use = uses.get(event.name)
        if use is None and event.end == event.start:
            continue
        placed = ("", "") if use is None else (str(planned.choice[use].candidate.layout), devices[use])
        memory = f"{event.peak / 1e9:.1f}" if use is not None else ""
        row = (event.name, *placed, figure(event.start), figure(event.end - event.start), memory)
        table.add_row(*map(Text, row))
    problem = planned.problem
    console = make_console()
    console.print(f"{problem.num_devices} {problem.hardware.name}, one step", style="bold", markup=False)
    console.print(table)
    rows = [("proof", of_proof(planned)), *of_rivals(planned)]
    idle = num_idle(problem, planned.choice)
    if idle:
        rows.append(("idle", f"{idle} of {problem.num_devices} devices: no call is faster for having them too"))
    fewer = [spot.candidate.slots for spot in planned.choice.values() if spot.candidate.slots is not None]
    rows += [("slots", f"{count} completions are drawn at a time, since more do not fit") for count in fewer]
    away = [name for name, role in problem.step.roles.items() if role.offloaded]
    if away:
        rows.append(("offload", f"{', '.join(away)}: in the host's memory between calls, since else nothing fits"))
    print_rows(f"step {figure(planned.seconds)} s", rows)


def _write(path: Path, asked: Asked, planned: Planned, hosts: Sequence[str], page: Callable[[], str]) -> None:
    """The plan with what it assumes, in JSON with what was predicted too, or as a page."""
    plan = planned.values
    values: dict[str, Any] = {"plan": named_hosts(plan, hosts) if hosts else plan}
    values["assumed"] = as_assumed(asked, planned.step)
    if path.suffix == ".json":
        values["hardware"] = as_values(planned.problem.hardware)
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
        text = page()
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
