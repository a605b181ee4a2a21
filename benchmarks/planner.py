"""`python -m benchmarks.planner`: how good the planner's plans are, and how long it takes to find and prove them.

`brute_force`: small cases against every plan there is. `scale`: time and proven gap up to 8,192 devices.
`strategies`: settings of ReaL's paper (Mei et al. 2024, arXiv:2406.14088) against plans by hand. `scaling`: step
times as batch and devices grow. All of that is the cost model's word. `prediction`: it is held against real steps
of this machine (`prediction.py`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import machine
from benchmarks.prediction import in_prediction
from meshift.config.sections import TrainableConfig
from meshift.models.config import DecoderConfig
from meshift.models.hf.families import read_config
from meshift.models.shards import shard_table
from meshift.planner.brute_force import brute_force
from meshift.planner.candidates import Problem
from meshift.planner.hardware import KNOWN, Hardware
from meshift.planner.planning import SEARCH_SHARE, carried, make_plan
from meshift.planner.prove import Proof, has_solver, prove
from meshift.planner.search import score, search
from meshift.planner.strategies import STRATEGIES
from meshift.planner.timeline import Choice
from meshift.planner.workload import PlannedCall, Role, Step, Texts

LLAMA = MappingProxyType(
    {
        # name: layers, hidden, intermediate, heads, key-value heads
        "1b": (16, 2048, 8192, 32, 8),
        "7b": (32, 4096, 11008, 32, 32),
        "13b": (40, 5120, 13824, 40, 40),
        "34b": (48, 8192, 22016, 64, 8),
        "70b": (80, 8192, 28672, 64, 8),
    }
)
PROMPT, MINI_BATCHES = 128, 8
SCALE = MappingProxyType({"7b": (8, 32, 128, 1024), "70b": (128, 1024, 8192)})
"""Actor and critic, and devices."""
TOKENS = 512 * 256
"""Of a step on 16 devices, as in the paper: 512 sequences of 256 tokens, or fewer longer ones."""
PAPER = MappingProxyType(
    {
        "actor grows": (
            ("7b", "7b", 8),
            ("7b", "7b", 16),
            ("13b", "7b", 32),
            ("34b", "7b", 64),
            ("70b", "7b", 128),
        ),
        "both grow": (("13b", "13b", 32), ("34b", "34b", 64), ("70b", "70b", 128)),
    }
)
NEW_TOKENS = (128, 384, 896)
MEASURED = MappingProxyType(
    {
        ("actor grows", 64, 128): {
            "DeepSpeed-Chat": 0.77,
            "OpenRLHF": 0.71,
            "Megatron heuristic": 3.08,
            "ReaL": 3.23,
        },
        ("both grow", 128, 128): {
            "DeepSpeed-Chat": 0.78,
            "OpenRLHF": 0.72,
            "Megatron heuristic": 5.20,
            "ReaL": 6.45,
        },
    }
)
"""PFLOP/s of the whole cluster that ReaL's paper measured, by setting, devices and new tokens."""
PASSES = MappingProxyType({"generate": 2, "infer": 2, "train": 6})
"""Operations for each parameter and token, as that paper counts them (nothing is computed twice)."""


def llama(name: str) -> DecoderConfig:
    """A Llama of the usual sizes."""
    layers, hidden, intermediate, heads, kv_heads = LLAMA[name]
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
    }
    return read_config(raw, name)


def ppo(actor: str, critic: str, num_sequences: int, new_tokens: int, *, reward: bool = True) -> Step:
    """A step of PPO, with all new tokens drawn, as the paper fixes them, and all sequences decoded together."""
    passes = TrainableConfig(gradient_checkpointing=True, max_tokens_per_micro_batch=16384)
    texts = Texts(
        num_prompts=num_sequences,
        prompt=PROMPT,
        longest_prompt=PROMPT,
        completion=new_tokens,
        longest_completion=new_tokens,
    )
    roles = {
        "actor": Role(name="actor", config=llama(actor), head="lm", trained=True, passes=passes),
        "critic": Role(name="critic", config=llama(critic), head="value", trained=True, passes=passes),
        "reference": Role(name="reference", config=llama(actor), head="lm", passes=passes),
    }
    if reward:
        roles["reward"] = Role(name="reward", config=llama(critic), head="reward", passes=passes)

    def call(name: str, role: str, kind: Any, waits: Sequence[str] = (), num_updates: int = 1) -> PlannedCall:
        return PlannedCall(
            name=name,
            role=role,
            kind=kind,
            texts=texts,
            waits=frozenset(waits),
            num_updates=num_updates,
            num_read=1 if name == "score" else new_tokens,
            num_slots=num_sequences,
        )

    calls = [call("rollout", "actor", "generate")]
    calls += [call("score", "reward", "infer", ["rollout"])] if reward else []
    calls += [call("reference", "reference", "infer", ["rollout"]), call("values", "critic", "infer", ["rollout"])]
    known = [one.name for one in calls]
    calls += [call(f"train_{role}", role, "train", known, MINI_BATCHES) for role in ("actor", "critic")]
    return Step(roles=roles, calls=tuple(calls))


def of_actor(model: str, num_sequences: int, new_tokens: int) -> Step:
    """GRPO's calls: the critic and the reward model left out."""
    whole = ppo(model, model, num_sequences, new_tokens, reward=False)
    names = {"rollout", "reference", "train_actor"}
    calls = tuple(
        PlannedCall(**{**vars(call), "waits": call.waits & names}) for call in whole.calls if call.name in names
    )
    roles = {name: role for name, role in whole.roles.items() if name != "critic"}
    return Step(roles=roles, calls=calls)


def find(problem: Problem, seconds: float, known: Choice | None = None) -> tuple[Proof, float, float]:
    """A plan and its proof in so many seconds; the local search's own seconds a step, and how long all took.

    `known` is a plan to begin with, beside those by hand.
    """
    begun = time.perf_counter()
    hints: list[Choice] = [made for make in STRATEGIES.values() if (made := make(problem)) is not None]
    hints += [] if known is None else [known]
    choice = search(problem, seconds=SEARCH_SHARE * seconds, hints=hints)
    local = score(problem, choice).seconds
    left = max(1.0, seconds - (time.perf_counter() - begun))
    proof = prove(problem, choice, seconds=left)
    return proof, local, time.perf_counter() - begun


def in_brute_force(seconds: float) -> list[dict[str, Any]]:
    """Small cases, of which every plan is counted."""
    small, tight = KNOWN["a100"], KNOWN["a100"].changed(memory=0.5)
    cases: list[tuple[str, Step, Hardware, int, bool]] = [
        ("PPO, 2 devices", ppo("1b", "1b", 64, 128, reward=False), small, 2, True),
        ("PPO, 2 devices of half the memory", ppo("1b", "1b", 64, 128, reward=False), tight, 2, True),
        ("GRPO, 4 devices", of_actor("1b", 64, 128), small, 4, True),
        ("GRPO, 8 devices", of_actor("1b", 64, 128), small, 8, False),
        ("GRPO of 7B, 8 devices", of_actor("7b", 128, 384), small, 8, False),
    ]
    rows = []
    for name, step, hardware, num_devices, sharding in cases:
        problem = Problem(step, hardware, num_devices, sharding=sharding)
        begun = time.perf_counter()
        best = brute_force(problem)
        counting = time.perf_counter() - begun
        assert best is not None, name
        proof, local, taken = find(problem, seconds)
        row = {"case": name, "best_s": best[0], "plan_s": proof.seconds, "local_s": local, "bound_s": proof.bound}
        rows.append({**row, "counting_s": counting, "planning_s": taken, "proven": proof.proven})
    return rows


def in_scale(seconds: float) -> list[dict[str, Any]]:
    """PPO with a reward model, on H100s; sequences grow with devices. Time is that of a plan with its settings.

    `local_over_plan`: the local search once more, alone and without plans by hand to begin with.
    """
    rows = []
    for model, sizes in SCALE.items():
        for num_devices in sizes:
            step = ppo(model, model, max(128, 8 * num_devices), 512)
            budget = seconds if num_devices <= 1024 else 4 * seconds
            begun = time.perf_counter()
            planned = make_plan(step, KNOWN["h100"], num_devices, seconds=budget)
            num_settings = len(planned.settings)
            taken = time.perf_counter() - begun
            problem, proof = planned.problem, planned.proof
            num_candidates = sum(map(len, problem.candidates.values()))
            alone = score(problem, search(problem, seconds=SEARCH_SHARE * budget)).seconds
            row = {"model": model, "devices": num_devices, "candidates": num_candidates, "step_s": proof.seconds}
            row |= {"local_over_plan": alone / proof.seconds, "gap": proof.gap, "proven": proof.proven}
            rows.append({**row, "planning_s": taken, "settings": num_settings})
    return rows


def in_strategies(seconds: float) -> list[dict[str, Any]]:
    """How many times as long a step takes by hand."""
    rows = []
    for setting, cases in PAPER.items():
        for actor, critic, num_devices in cases:
            for new_tokens in NEW_TOKENS:
                sequences = TOKENS * num_devices // 16 // (PROMPT + new_tokens)
                step = ppo(actor, critic, sequences, new_tokens)
                problem = Problem(step, KNOWN["a100"], num_devices)
                proof = find(problem, seconds)[0]
                measured = MEASURED.get((setting, num_devices, new_tokens))
                row: dict[str, Any] = {
                    "setting": setting,
                    "actor": actor,
                    "critic": critic,
                    "devices": num_devices,
                }
                row |= {"new_tokens": new_tokens, "step_s": proof.seconds, "gap": proof.gap}
                row |= {"pflops": operations(step) / proof.seconds / 1e15, "paper_pflops": measured}
                if measured is not None:
                    row["over_real"] = {name: measured["ReaL"] / rate for name, rate in measured.items()}
                rows.append({**row, "over_plan": dict(_by_hand(problem, proof.seconds))})
    return rows


def operations(step: Step) -> float:
    """Of all calls, by parameters and tokens."""
    numbers = {
        name: sum(shard.num_elements for shard in shard_table(role.config, role.head).values())
        for name, role in step.roles.items()
    }
    return sum(
        PASSES[call.kind] * numbers[call.role] * call.texts.num_rows(share_prefixes=False) for call in step.calls
    )


def _by_hand(problem: Problem, seconds: float) -> list[tuple[str, float | None]]:
    """None: such a plan does not fit."""
    found = []
    for name, make in STRATEGIES.items():
        choice = make(problem)
        reached = None if choice is None else score(problem, choice)
        fits = reached is not None and reached.excess == 0
        found.append((name, reached.seconds / seconds if reached is not None and fits else None))
    return found


def in_scaling(seconds: float) -> list[dict[str, Any]]:
    """7B on more and more devices with as many sequences for each: what is lost to size."""
    rows: list[dict[str, Any]] = []
    known: Choice | None = None
    for num_devices in (8, 16, 32, 64, 128, 256, 512, 1024):
        problem = Problem(ppo("7b", "7b", 32 * num_devices, 512), KNOWN["h100"], num_devices)
        proof = find(problem, seconds, None if known is None else carried(problem, known, 2))[0]
        known = proof.choice
        rows.append({"devices": num_devices, "step_s": proof.seconds, "gap": proof.gap})
        rows[-1]["efficiency"] = rows[0]["step_s"] / proof.seconds
    return rows


SECTIONS: Mapping[str, tuple[Callable[[float], Any], float]] = MappingProxyType(
    {
        "brute_force": (in_brute_force, 10.0),
        "scale": (in_scale, 20.0),
        "strategies": (in_strategies, 8.0),
        "scaling": (in_scaling, 30.0),
        "prediction": (in_prediction, 10.0),
    }
)
"""Name -> what it measures, and the seconds that each plan may take."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run sections; prints the JSON too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, with commas between")
    parser.add_argument("--under", default="", help="begins each command of `prediction` that measures")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="what `prediction` measures; not measured again")
    parser.add_argument(
        "--rows", default="", help="placements of `prediction`, or parts of their names, by commas"
    )
    given = parser.parse_args(arguments)
    wanted = [part.strip() for part in given.rows.split(",") if part.strip()]
    measured = partial(in_prediction, prefix=shlex.split(given.under), folder=given.keep, wanted=wanted)
    sections: dict[str, tuple[Callable[[float], Any], float]] = {
        **SECTIONS,
        "prediction": (measured, 10.0),
    }
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "solver": has_solver(),
    }
    for name in given.sections.split(","):
        measure, seconds = sections[name]
        result[name] = measure(seconds)
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
