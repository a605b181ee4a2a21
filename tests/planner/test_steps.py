"""The step that is planned has the calls of the algorithm's graph, and waits where that does."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meshift.algorithms.dpo import dpo_graph
from meshift.algorithms.dynamic_sampling import DynamicSampling
from meshift.algorithms.kto import kto_graph
from meshift.algorithms.orpo import orpo_graph
from meshift.algorithms.policy_graph import Drawing
from meshift.algorithms.ppo import PPO
from meshift.batch import Batch, Outcome, Ragged
from meshift.config.policy_runs import (
    DAPORunConfig,
    GRPORunConfig,
    OnlineDPORunConfig,
    RAFTRunConfig,
    ReMaxRunConfig,
    RLOORunConfig,
)
from meshift.config.runs import (
    DPORunConfig,
    KTORunConfig,
    ORPORunConfig,
    PPORunConfig,
    RewardRunConfig,
    SFTRunConfig,
)
from meshift.graph.ahead import halves_of
from meshift.graph.calls import LoopCall, ModelCall, SyncCall
from meshift.models.hf.families import read_config
from meshift.planner.rollout_steps import Lengths, prompts_by_round
from meshift.planner.steps import in_one_process, role_names, step_of
from meshift.runtime.memory import held_models
from meshift.runtime.policy_run import CRITIC_FREE, policy_models
from meshift.runtime.ppo_run import role_models
from meshift.runtime.rollout_run import sketched_sampling

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 47, "num_hidden_layers": 5}
LLAMA = read_config({"model_type": "llama", "num_attention_heads": 4, **SIZES}, "a test")
SHARED = {"output_dir": "runs/x", "data": {"dataset_name": "x.jsonl", "batch_size": 8}}
FUNCTION = {"functions": [{"function": "x.py:f"}]}


def config(kind, **sections):
    return kind.model_validate({**SHARED, "actor": {"model_name_or_path": "a"}, **sections})


CASES = {
    "ppo": lambda: config(PPORunConfig, reward={"model_name_or_path": "r"}),
    "ppo with a moving reference": lambda: config(
        PPORunConfig, reward=FUNCTION, reference={"sync_ref_model": True, "ref_model_sync_steps": 3}
    ),
    "ppo with a shared trunk": lambda: config(
        PPORunConfig, reward=FUNCTION, ppo={"shared_trunk": True, "recompute_logprobs": True}
    ),
    "grpo": lambda: config(GRPORunConfig, reward=FUNCTION),
    "grpo that reads old log-probs again": lambda: config(
        GRPORunConfig, reward=FUNCTION, grpo={"recompute_logprobs": True, "num_iterations": 2, "kl_coef": 0.1}
    ),
    "decoupled ppo": lambda: config(
        PPORunConfig, reward=FUNCTION, ppo={"recompute_logprobs": True, "importance_correction": "token"}
    ),
    "rloo": lambda: config(RLOORunConfig, reward={"model_name_or_path": "r"}),
    "ppo with a cost": lambda: config(
        PPORunConfig, reward=FUNCTION, cost={"model_name_or_path": "c", "functions": FUNCTION["functions"]}
    ),
    "online dpo in rounds": lambda: config(
        OnlineDPORunConfig, reward={"model_name_or_path": "r"}, online_dpo={"steps_per_round": 4}
    ),
    "raft": lambda: config(RAFTRunConfig, reward=FUNCTION, raft={"kl_coef": 0.1, "num_kept": 2}),
    "kto": lambda: config(KTORunConfig, reference={"sync_ref_model": True}),
    "orpo": lambda: config(ORPORunConfig),
    "dpo": lambda: config(DPORunConfig),
    "dpo with known references": lambda: config(DPORunConfig, dpo={"precompute_ref_log_probs": True}),
}


def graph_of(given):
    for kind, make in ((DPORunConfig, dpo_graph), (KTORunConfig, kto_graph), (ORPORunConfig, orpo_graph)):
        if isinstance(given, kind):
            return make(given)
    sampling, functions = sketched_sampling(given)
    if isinstance(given, PPORunConfig):
        return PPO(given, sampling).graph(functions, cost_functions=functions)
    return CRITIC_FREE[type(given)][1](given, Drawing(sampling=sampling, reward_functions=functions))


def ancestors(edges, name):
    return set().union(*({one} | ancestors(edges, one) for one in edges[name]))


@pytest.mark.parametrize("case", CASES)
def test_a_planned_step_is_the_graph_of_its_algorithm(case):
    given = CASES[case]()
    planned = step_of(given, dict.fromkeys(role_names(given), LLAMA), "bfloat16")
    graph = graph_of(given)
    assert [(c.name, c.role, c.kind) for c in planned.calls] == [call[1:] for call in within(graph)]
    models = {call.name: call for call in graph.order() if isinstance(call, ModelCall)}
    edges = {call.name: call.waits for call in planned.calls}
    inside = edges.keys() - models.keys()
    for name in models:
        loops = {call.name for call in graph.order() if isinstance(call, LoopCall)} & ancestors(graph.edges, name)
        assert ancestors(edges, name) == ancestors(graph.edges, name) & set(models) | (inside if loops else set())
    for call in planned.calls:
        if call.kind == "train":
            task = models[call.name].task
            assert (call.num_passes, call.num_updates) == (task.num_epochs, task.num_mini_batches)
    syncs = [(c.source, c.target, c.every) for c in graph.order() if isinstance(c, SyncCall)]
    assert [(m.source, m.target, m.every) for m in planned.mixings] == syncs


def test_roles_start_from_the_models_that_a_run_gives_them():
    ppo, grpo = CASES["ppo"](), CASES["rloo"]()
    assert role_names(ppo) == role_models(ppo)
    assert role_names(CASES["ppo with a shared trunk"]()) == role_models(CASES["ppo with a shared trunk"]())
    assert role_names(CASES["ppo with a cost"]()) == role_models(CASES["ppo with a cost"]())
    assert role_names(grpo) == policy_models(grpo)
    assert role_names(CASES["dpo"]()) == {"actor": "a", "reference": "a"}


LORA = {"lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"]}, "num_frozen_layers": 1}
ADAPTED = {"model_name_or_path": "a", **LORA}
SHARING = {
    "a reference beside adapters": (config(DPORunConfig, actor=ADAPTED), {"reference"}),
    "a reference of its own": (
        config(DPORunConfig, actor=ADAPTED, reference={"model_name_or_path": "b"}),
        set(),
    ),
    "one that moves": (config(DPORunConfig, actor=ADAPTED, reference={"sync_ref_model": True}), set()),
    "one that leaves": (config(DPORunConfig, actor=ADAPTED, plan={"reference": {"offload": True}}), set()),
    "an actor that leaves": (config(DPORunConfig, actor=ADAPTED, plan={"actor": {"offload": True}}), set()),
    "no adapters": (config(DPORunConfig), set()),
    "a critic's too": (
        config(PPORunConfig, actor=ADAPTED, critic=LORA, reward={"model_name_or_path": "r"}),
        {"reference", "reward"},
    ),
    "rounds": (
        config(
            OnlineDPORunConfig,
            actor=ADAPTED,
            reward={"model_name_or_path": "r"},
            online_dpo={"steps_per_round": 4},
        ),
        set(),
    ),
}


@pytest.mark.parametrize("case", SHARING)
def test_a_role_borrows_what_adapters_leave_in_the_plan_as_in_the_run(case, monkeypatch):
    monkeypatch.setattr("meshift.runtime.models.model_folder", Path)  # these models are names only
    given, borrowing = SHARING[case]
    step = step_of(given, dict.fromkeys(role_names(given), LLAMA), "bfloat16")
    roles = {name: replace(one, offloaded=name in given.plan.offloaded) for name, one in step.roles.items()}
    found = in_one_process(given, replace(step, roles=roles))
    assert {name for name, one in found.roles.items() if one.borrows} == borrowing
    assert {one.role for one in held_models(given)} == found.roles.keys() - borrowing


AHEAD = {
    "grpo": config(GRPORunConfig, reward={"model_name_or_path": "r"}, grpo={"kl_coef": 0.1}),
    "ppo": config(PPORunConfig, reward={"model_name_or_path": "r"}),
    "dapo": config(DAPORunConfig, reward={"model_name_or_path": "r"}),
    "remax": config(ReMaxRunConfig, reward={"model_name_or_path": "r"}, remax={"kl_coef": 0.0}),
    "raft": config(RAFTRunConfig, reward={"model_name_or_path": "r"}, raft={"kl_coef": 0.1, "num_kept": 2}),
    "online dpo": config(OnlineDPORunConfig, reward={"model_name_or_path": "r"}),
}


@pytest.mark.parametrize("case", AHEAD)
def test_what_is_drawn_ahead_waits_for_nothing_of_its_step_nor_is_waited_for(case):
    given = AHEAD[case]
    models = dict.fromkeys(role_names(given), LLAMA)
    at_once = {call.name: call for call in step_of(given, models, "bfloat16").calls}
    step = step_of(given.model_copy(update={"max_staleness": 1}), models, "bfloat16")
    ahead, learning = step.calls, {call[1] for call in within(halves_of(graph_of(given)).learning)}
    drawing = {call.name for call in ahead if call.name not in learning}
    assert "rollout" in drawing
    assert [call.name in drawing for call in ahead] == sorted(call.name in drawing for call in ahead)
    assert step.draws_ahead
    for call in ahead:
        own = call.name in drawing
        assert call.waits == {name for name in at_once[call.name].waits if (name in drawing) == own}
        assert replace(call, waits=frozenset()) == replace(at_once[call.name], waits=frozenset())


def test_only_roles_with_lora_have_adapters_and_where_it_says():
    step = step_of(
        SHARING["a critic's too"][0], dict.fromkeys(("actor", "critic", "reference", "reward"), LLAMA), "bfloat16"
    )
    adapters = {name: one.config.adapter for name, one in step.roles.items() if one.config.adapter is not None}
    assert adapters.keys() == {"actor", "critic"}
    assert {(a.rank, a.targets, a.first_layer) for a in adapters.values()} == {
        (4, ("attention.query", "mlp.down"), 1)
    }


@pytest.mark.parametrize(("kind", "role"), [(SFTRunConfig, "actor"), (RewardRunConfig, "reward")])
def test_runs_on_given_texts_have_one_call(kind, role):
    given = kind.model_validate({**SHARED, "model": {"model_name_or_path": "m"}})
    (call,) = step_of(given, {role: LLAMA}, "float32").calls
    assert (call.name, call.role, call.kind) == (f"train_{role}", role, "train")
    assert call.texts.longest == given.data.max_length


def test_lengths_are_half_of_the_limits_unless_they_are_told():
    given = CASES["grpo"]()
    usual = step_of(given, {"actor": LLAMA}, "bfloat16").calls[0].texts
    assert (usual.prompt, usual.completion) == (256, 64)
    told = step_of(given, {"actor": LLAMA}, "bfloat16", Lengths(prompt=100, completion=500)).calls[0].texts
    assert (told.prompt, told.completion) == (100, 128)


def within(graph):
    """Model calls, those of loops among them, each after the call of the step that it is, or is a part of."""
    found = []
    for call in graph.order():
        if isinstance(call, LoopCall):
            inner = [(one.name, one.role, one.kind) for one in call.graph.order() if isinstance(one, ModelCall)]
            found += [(call.name, *one) for one in inner]
        elif isinstance(call, ModelCall):
            found.append((call.name, call.name, call.role, call.kind))
    return found


def test_the_greedy_completions_of_remax_are_planned():
    given = config(ReMaxRunConfig, reward={"model_name_or_path": "r"}, generation={"num_generations": 3})
    planned = step_of(given, dict.fromkeys(role_names(given), LLAMA), "bfloat16")
    assert [(c.timed_as, c.role, c.kind) for c in planned.calls] == [
        (outer, *of) for outer, _, *of in within(graph_of(given))
    ]
    greedy = {c.name: c for c in planned.calls if c.timed_as == "greedy_baseline"}
    assert {c.texts.num_sequences for c in greedy.values()} == {8}
    assert greedy["score (greedy)"].waits == {"rollout (greedy)"}
    training = planned.calls[-1]
    assert training.waits == {c.name for c in planned.calls[:-1]}
    assert training.texts.num_sequences == 24


def test_each_round_of_dapo_is_planned_after_the_one_before():
    given = config(DAPORunConfig, reward={"model_name_or_path": "r"}, generation={"num_generations": 4})
    planned = step_of(given, dict.fromkeys(role_names(given), LLAMA), "bfloat16", Lengths(signal=0.4))
    assert [(c.timed_as, c.texts.num_prompts) for c in planned.calls[:-1]] == [
        (name, count) for count in (8, 8, 4) for name in ("rollout", "score")
    ]
    calls = {call.name: call for call in planned.calls}
    assert calls["rollout (round 2)"].waits == {"rollout", "score"}
    assert calls["score (round 3)"].waits == {"rollout (round 3)"}
    assert calls["train_actor"].texts.num_prompts == 8
    without = config(DAPORunConfig, reward=FUNCTION, dapo={"dynamic_sampling": False})
    assert [c.name for c in step_of(without, {"actor": LLAMA}, "bfloat16").calls] == ["rollout", "train_actor"]


@pytest.mark.parametrize("signal", [1.0, 0.75, 0.5, 0.25, 0.0])
def test_rounds_are_those_that_dynamic_sampling_draws(signal):
    """Against the call itself, fed with rounds of which exactly that share of prompts has signal."""
    size = 64
    sampling = DynamicSampling(
        num_groups=size, num_generations=2, max_rounds=5, weight=1.0, more_prompts=lambda step, round_, n: rows(n)
    )
    counts, outcomes, signals = [], [], 0.0
    while (fed := sampling.feed(rows(size), outcomes)) is not None:
        counts.append(len(fed) // 2)
        told, signals = round(signals + signal * counts[-1]) - round(signals), signals + signal * counts[-1]
        scores = [float(i % 2 and i // 2 < told) for i in range(len(fed))]
        written = {"function_scores": Ragged.scalars(torch.tensor(scores))}
        outcomes.append(Outcome(batch=fed.union(Batch(written))))
    assert prompts_by_round(size, signal, 5) == counts


def rows(num_prompts):
    """Two rows for each prompt."""
    return Batch({"index": Ragged.scalars(torch.arange(2 * num_prompts))})
