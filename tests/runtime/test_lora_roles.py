"""Every role of every method trains adapters alone, and writes folders that `peft` makes the same model of."""

import pytest
import torch
from spread_cases import SMOOTH, Case, placed, run

from meshift.config.policy_runs import OnlineDPORunConfig, RAFTRunConfig
from meshift.config.runs import (
    DPORunConfig,
    KTORunConfig,
    ORPORunConfig,
    PPORunConfig,
    RewardRunConfig,
    SFTRunConfig,
    SimPORunConfig,
)
from meshift.models.adapters import merged_model
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.hf.adapter_files import find_adapter, is_adapter, loading_by_peft
from meshift.models.hf.load import load_model
from meshift.models.two_heads import one_head_of
from meshift.runtime.policy_run import METHODS
from meshift.runtime.role_spec import RoleSpec

LORA = {"lora": {"rank": 2, "alpha": 4}}
IDS = torch.tensor([3, 2, 5, 4, 6])
LEARNING_CRITIC = {**SMOOTH, **LORA}
CASES = {
    **{schema.SECTION: Case(schema, {}, {"actor": LORA}) for schema in METHODS},
    "online_dpo": Case(OnlineDPORunConfig, {}, {"actor": LORA, "generation": {"num_generations": 3}}),
    "raft": Case(RAFTRunConfig, {}, {"actor": LORA}),
    "ppo": Case(PPORunConfig, {}, {"actor": LORA, "critic": LEARNING_CRITIC, "cost_critic": LEARNING_CRITIC}),
    "ppo, one trunk": Case(
        PPORunConfig,
        {},
        {"actor": LORA, "ppo": {"shared_trunk": True}, "critic": None, "cost": None, "cost_critic": None},
    ),
    "dpo": Case(DPORunConfig, {}, {"actor": LORA}),
    "kto": Case(KTORunConfig, {}, {"actor": LORA}),
    "orpo": Case(ORPORunConfig, {}, {"actor": LORA}),
    "simpo": Case(SimPORunConfig, {}, {"actor": LORA}),
    "sft": Case(SFTRunConfig, {}, {"model": LORA}),
    "reward": Case(RewardRunConfig, {}, {"model": LORA}),
}
FOLDERS = {
    "ppo": {"actor": "final", "critic": "final_critic", "cost_critic": "final_cost_critic"},
    "reward": {"reward": "final"},
}
SCORES = ("reward", "critic", "cost_critic")


@pytest.fixture
def opened(monkeypatch):
    """By role that is trained: its model, and a copy of what it began with."""
    found, make = {}, RoleSpec.make

    def watched(spec, model, *arguments, **keywords):
        if spec.max_steps is not None:
            found[spec.name] = model, {name: p.detach().clone() for name, p in model.named_parameters()}
        return make(spec, model, *arguments, **keywords)

    monkeypatch.setattr(RoleSpec, "make", watched)
    return found


@torch.no_grad()
def ours(model, head):
    if model.config.value_head:
        model = one_head_of(model, head)
    return plain(merged_model(model), head)


@torch.no_grad()
def plain(model, head):
    found = model.head(model(IDS, packed_positions([len(IDS)]), PackedAttention([len(IDS)])))
    return found if head == "lm" else found[-1:, None]


@torch.no_grad()
def pefts(folder, head):
    """By the very expression that a run prints."""
    peft = pytest.importorskip("peft")
    expression = loading_by_peft(folder)
    model = eval(expression, {name: getattr(peft, name) for name in dir(peft) if name.startswith("Auto")}).eval()
    found = model(input_ids=IDS[None]).logits
    return found[0] if head == "lm" else found


@pytest.mark.parametrize("name", CASES)
def test_more_than_adapters_would_move_or_peft_would_make_another_model(name, make_case, opened, tmp_path):
    run(make_case(CASES[name], tmp_path / "run", max_steps=2))
    folders = FOLDERS.get(name, dict.fromkeys(opened, "final"))
    assert folders.keys() == opened.keys()
    for role, folder in folders.items():
        model, began = opened[role]
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, began[n])}
        adapters = {n for n in began if n.endswith(("lora_a", "lora_b"))}
        head = {"head.weight"} if role in SCORES else {"head.value.weight"} & began.keys()
        assert adapters <= moved, "every adapter learns"
        assert moved <= adapters | head
        kinds = {"final": "value" if role in SCORES else "lm", "final_critic": "value"}
        for kind_of, kind in kinds.items() if model.config.value_head else [(folder, kinds.get(folder, "value"))]:
            assert is_adapter(tmp_path / "run" / kind_of)
            torch.testing.assert_close(
                pefts(tmp_path / "run" / kind_of, kind), ours(model, kind), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("method", ["reward", "ppo, one trunk"])
def test_peft_has_to_be_told_of_one_score(method, make_case, tmp_path):
    """Else the sentence in docs/lora.md could go."""
    peft = pytest.importorskip("peft")
    result = run(make_case(CASES[method], tmp_path / "run", max_steps=1))
    folder = result.final_dir if method == "reward" else result.final_dir.with_name("final_critic")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*score"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(folder)


PLANS = {
    "cut by rows and columns": {"actor": placed(generate="d1@1", train="t2@0,1")},
    "state shared out": {"actor": placed(generate="d2@0-1", train="d2s@0-1")},
}


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_adapters_gathered_from_a_plan_would_be_others_than_those_of_one_process(plan, make_case, tmp_path):
    case = Case(CASES["grpo"].schema, {}, {"actor": LORA})
    spread = run(make_case(case, tmp_path / "spread", plan=plan, max_steps=2)).final_dir
    alone = run(make_case(case, tmp_path / "alone", max_steps=2)).final_dir
    assert is_adapter(spread)
    torch.testing.assert_close(pefts(spread, "lm"), pefts(alone, "lm"), atol=1e-5, rtol=1e-4)
    base = find_adapter(spread).model
    assert not torch.allclose(pefts(spread, "lm"), plain(load_model(base), "lm"), atol=1e-4)
