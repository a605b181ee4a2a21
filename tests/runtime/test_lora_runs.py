"""Runs that train adapters: what they learn, keep, write and go on from, and what they share."""

import json
import shutil

import pytest
import torch
from broken_runs import KEPT, Notes
from safetensors.torch import load_file
from test_policy_run import REWARDS

from meshift.cli.main import main
from meshift.config.loading import make_config
from meshift.config.policy_runs import GRPORunConfig
from meshift.errors import ConfigError, ModelError
from meshift.models.adapters import merged_model, without_adapter
from meshift.models.hf.adapter_files import is_adapter
from meshift.models.hf.load import load_model
from meshift.runtime.dpo_run import build_dpo_job, check_dpo, run_dpo
from meshift.runtime.memory import held_bytes, held_models
from meshift.runtime.observer import SilentObserver
from meshift.runtime.policy_run import run_policy
from meshift.runtime.ppo_run import build_ppo_job, run_ppo
from meshift.runtime.reward_run import run_reward
from meshift.runtime.role_spec import LocalOpener
from meshift.runtime.sft_run import check_sft, run_sft
from meshift.step import run_step
from meshift.training.checkpoint import read_state

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture
def sections(actor_folder):
    """How a section trains by adapters."""

    def make(rate=1e-2, **changes):
        return {"model_name_or_path": str(actor_folder), "learning_rate": rate, "lora": {**LORA, **changes}}

    return make


def losses(read_lines, folder, key):
    return [row[key] for row in read_lines(folder / "metrics.jsonl") if row.get(key) is not None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sft_learns_and_leaves_an_adapter(dtype, sft_config_on_disk, sections, actor_folder, tmp_path, read_lines):
    config = sft_config_on_disk(tmp_path / "run", model=sections(3e-2), max_steps=25, dtype=dtype)
    final = run_sft(config, SilentObserver()).final_dir
    found = losses(read_lines, tmp_path / "run", "eval/loss")
    start = losses(read_lines, tmp_path / "run", "loss")[0]
    assert found[-1] < 0.75 * start
    assert is_adapter(final)
    held = load_file(final / "adapter_model.safetensors")
    assert all(".lora_" in name for name in held)
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(actor_folder)
    assert (final / "tokenizer.json").is_file()
    whole = tmp_path / "whole"
    assert main(["convert", str(final), str(whole)]) == 0
    merged, read = load_model(whole), load_model(final)
    assert all(torch.equal(p, q) for p, q in zip(merged.parameters(), read.parameters(), strict=True))
    assert main(["generate", "--model", str(final), "--prompt", "the film was", "--max-new-tokens", "2"]) == 0


def test_save_merged_would_write_another_model(sft_config_on_disk, sections, tmp_path):
    runs = {
        merged: run_sft(
            sft_config_on_disk(tmp_path / str(merged), model=sections(save_merged=merged), max_steps=3),
            SilentObserver(),
        ).final_dir
        for merged in (True, False)
    }
    assert (runs[True] / "config.json").is_file()
    assert not (runs[True] / "adapter_config.json").exists()
    one, other = (load_model(folder) for folder in runs.values())
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpoints_hold_adapters_only_and_a_resumed_run_has_the_bits_of_the_unbroken(
    dtype, sft_config_on_disk, sections, tmp_path
):
    config = sft_config_on_disk(tmp_path / "run", **(KEPT | {"model": sections(), "dtype": dtype}))
    whole = load_file(run_sft(config, SilentObserver()).final_dir / "adapter_model.safetensors")
    folders = sorted((tmp_path / "run").glob("checkpoint-*"))
    state = read_state(folders[0] / "actor").tensors
    assert {key.rpartition(".")[2] for key in state} == {"lora_a", "lora_b"}
    assert {key.partition("/")[0] for key in state} == {"master", "step", "exp_avg", "exp_avg_sq"}
    broken = sft_config_on_disk(tmp_path / "broken", **(KEPT | {"model": sections(), "dtype": dtype}))
    with pytest.raises(KeyboardInterrupt):
        run_sft(broken, Notes(break_after=3))
    on = sft_config_on_disk(tmp_path / "broken", **(KEPT | {"model": sections(), "dtype": dtype, "resume": True}))
    again = load_file(run_sft(on, SilentObserver()).final_dir / "adapter_model.safetensors")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_another_base_would_be_gone_on_with(sft_config_on_disk, make_folder, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_folder(seed=1), base)
    model = {"model_name_or_path": str(base), "learning_rate": 1e-2, "lora": LORA}
    with pytest.raises(KeyboardInterrupt):
        run_sft(sft_config_on_disk(tmp_path / "run", **(KEPT | {"model": model})), Notes(break_after=3))
    shutil.rmtree(base)
    shutil.copytree(make_folder(seed=2), base)
    on = sft_config_on_disk(tmp_path / "run", **(KEPT | {"model": model, "resume": True}))
    with pytest.raises(ModelError, match=r"model is not the one that .* was trained with"):
        run_sft(on, SilentObserver())


def test_grpo_learns_by_adapters_and_draws_with_what_it_trained(sections, prompts_file, tmp_path, read_lines):
    (tmp_path / "odd.py").write_text(REWARDS, encoding="utf-8")
    values = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 15,
        "dtype": "float32",
        "report_to": [],
        "num_report_prompts": 0,
        "data": {"dataset_name": prompts_file, "batch_size": 5},
        "actor": sections(3e-2),
        "reward": {"functions": [{"function": f"{tmp_path / 'odd.py'}:odd"}]},
        "generation": {"max_completion_length": 3, "num_generations": 8},
        "grpo": {"kl_coef": 0.01},
    }
    run_policy(make_config(GRPORunConfig, values), SilentObserver())
    rewards = losses(read_lines, tmp_path / "run", "reward/mean")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.25
    assert max(losses(read_lines, tmp_path / "run", "sync/logprob_diff_max")) < 1e-3


def test_a_reference_would_be_a_second_copy(dpo_config_on_disk, sections, tmp_path, actor_folder):
    config = dpo_config_on_disk(tmp_path / "run", actor=sections(), max_steps=3)
    roles = build_dpo_job(config, LocalOpener()).roles
    actor, reference = dict(roles["actor"].model.named_parameters()), roles["reference"].model
    assert all(parameter is actor[name] for name, parameter in reference.named_parameters())
    held = held_models(config)
    assert [one.role for one in held] == ["actor"]
    numbers = sum(p.numel() for p in actor.values())
    learned = sum(p.numel() for n, p in actor.items() if ".lora_" in n)
    assert held_bytes(config, held) == 4 * numbers + 12 * learned
    rows = dict(check_dpo(config))
    assert rows["reference model"].endswith("(no copy: what adapters leave as it is)")
    assert rows["actor trains"].startswith(f"{learned:,} numbers, ")


def test_a_shared_reference_would_give_other_numbers_than_one_of_its_own(
    dpo_config_on_disk, sections, tmp_path, read_lines, monkeypatch
):
    runs = [run_dpo(dpo_config_on_disk(tmp_path / "a", actor=sections(), max_steps=4), SilentObserver())]
    monkeypatch.setattr(LocalOpener, "_frozen_of_another", lambda opener, spec: None)
    runs.append(run_dpo(dpo_config_on_disk(tmp_path / "b", actor=sections(), max_steps=4), SilentObserver()))
    one, other = (load_file(run.final_dir / "adapter_model.safetensors") for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in other)
    a, b = (losses(read_lines, tmp_path / name, "loss") for name in "ab")
    assert a == b


def test_roles_that_are_not_what_the_actor_leaves_would_share_with_it(
    ppo_config_on_disk, sections, make_folder, tmp_path
):
    other = {"reference": {"model_name_or_path": str(make_folder(seed=8))}}
    for changes, shared in (({}, True), (other, False)):
        config = ppo_config_on_disk(tmp_path / "run", actor=sections(), **changes)
        roles = build_ppo_job(config, LocalOpener()).roles
        own = {id(p) for p in roles["actor"].model.parameters()}
        assert any(id(p) in own for p in roles["reference"].model.parameters()) == shared
        assert not any(id(p) in own for name in ("critic", "reward") for p in roles[name].model.parameters())
    config = ppo_config_on_disk(tmp_path / "run", actor=sections())
    roles = build_ppo_job(config, LocalOpener(None, frozenset({"actor"}))).roles
    own = {id(p) for p in roles["actor"].model.parameters()}
    assert not any(id(p) in own for p in roles["reference"].model.parameters())


def test_a_reward_model_would_be_a_second_copy_beside_its_critic(
    ppo_config_on_disk, sections, reward_folder, tmp_path, read_lines, monkeypatch
):
    critic = sections() | {"model_name_or_path": str(reward_folder)}
    config = ppo_config_on_disk(tmp_path / "a", actor=sections(), critic=critic)
    roles = build_ppo_job(config, LocalOpener()).roles
    own = dict(roles["critic"].model.named_parameters())
    apart = {name for name, p in roles["reward"].model.named_parameters() if p is not own[name]}
    assert apart == {"head.weight"}
    assert [one.role for one in held_models(config)] == ["actor", "critic"]
    run_ppo(config, SilentObserver())
    monkeypatch.setattr(LocalOpener, "_frozen_of_another", lambda opener, spec: None)
    run_ppo(ppo_config_on_disk(tmp_path / "b", actor=sections(), critic=critic), SilentObserver())
    for key in ("reward/reward_model", "objective/kl", "critic/vf_loss"):
        one, other = (losses(read_lines, tmp_path / name, key) for name in "ab")
        assert one == other
        assert len(one) == 2


def test_ppo_trains_the_adapters_of_actor_and_critic(ppo_config_on_disk, sections, reward_folder, tmp_path):
    critic = sections() | {"model_name_or_path": str(reward_folder)}
    run = run_ppo(ppo_config_on_disk(tmp_path / "run", actor=sections(), critic=critic), SilentObserver())
    for folder, head in ((run.final_dir, "lm"), (run.final_dir.with_name("final_critic"), "value")):
        assert is_adapter(folder)
        trained, base = (
            load_model(folder, head=head),
            load_model(reward_folder if head == "value" else sections()["model_name_or_path"], head=head),
        )
        moved = {
            n
            for (n, p), q in zip(trained.named_parameters(), base.parameters(), strict=True)
            if not torch.equal(p, q)
        }
        assert {name.split(".")[-2] for name in moved if name.startswith("layers")} == {
            *("query", "key", "value", "output", "gate", "up", "down")
        }
        assert ("head.weight" in moved) == (head == "value")


def test_a_reward_model_learns_by_adapters_and_scores_in_a_run(
    reward_config_on_disk, ppo_config_on_disk, sections, tmp_path, read_lines
):
    model = sections(1e-2)
    run = run_reward(reward_config_on_disk(tmp_path / "reward", model=model), SilentObserver())
    assert losses(read_lines, tmp_path / "reward", "eval/accuracy")[-1] > 0.9
    reward = {"model_name_or_path": str(run.final_dir), "weight": 1.0}
    run_ppo(ppo_config_on_disk(tmp_path / "ppo", reward=reward, max_steps=1), SilentObserver())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target_modules": ["w_q"]}, r"`model\.lora\.target_modules`: the model has no linear layer 'w_q'"),
        ({"frozen": 2}, r"`model\.num_frozen_layers` leaves no layer to put adapters into"),
    ],
)
def test_adapters_that_cannot_be_are_refused(changes, sentence, sft_config_on_disk, sections, tmp_path):
    frozen = changes.pop("frozen", 0)
    model = sections(**changes) | {"num_frozen_layers": frozen}
    with pytest.raises(ConfigError, match=sentence):
        check_sft(sft_config_on_disk(tmp_path / "run", model=model))


def test_adapters_on_adapters_and_moving_references_of_rows_are_refused(
    sft_config_on_disk, dpo_config_on_disk, sections, tmp_path
):
    final = run_sft(
        sft_config_on_disk(tmp_path / "run", model=sections(), max_steps=1), SilentObserver()
    ).final_dir
    on_top = sections() | {"model_name_or_path": str(final)}
    with pytest.raises(ConfigError, match="is an adapter's folder, and new adapters need a whole model"):
        check_sft(sft_config_on_disk(tmp_path / "next", model=on_top))
    run_dpo(
        dpo_config_on_disk(tmp_path / "whole", actor={"model_name_or_path": str(final)}, max_steps=1),
        SilentObserver(),
    )
    with pytest.raises(ConfigError, match=r"the reference follows whole matrices, and in d2s"):
        dpo_config_on_disk(
            tmp_path / "dpo",
            actor=sections(),
            reference={"sync_ref_model": True},
            plan={"actor": {"train": {"mesh": "0-1", "layout": "d2s"}}},
        )


def test_a_moving_reference_would_follow_something_else_than_the_sums(dpo_config_on_disk, sections, tmp_path):
    moving = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25}
    config = dpo_config_on_disk(tmp_path / "run", actor=sections(), reference=moving, max_steps=2)
    job = build_dpo_job(config, LocalOpener())
    actor, reference = job.roles["actor"], job.roles["reference"]
    expected = {name: p.detach().double().clone() for name, p in reference.model.named_parameters()}
    for step in range(2):
        run_step(job.graph, job.roles, job.next_batch(step), step=step)
        now = merged_model(actor.model)
        for name, parameter in now.named_parameters():
            expected[name] = 0.25 * parameter.detach().double() + 0.75 * expected[name]
    for name, parameter in reference.model.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], atol=1e-6, rtol=1e-6)
    assert not torch.equal(reference.model.layers[0].mlp.up.weight, actor.model.layers[0].mlp.up.weight)


def test_frozen_layers_have_no_adapters(sft_config_on_disk, sections, tmp_path):
    model = sections() | {"num_frozen_layers": 1}
    final = run_sft(sft_config_on_disk(tmp_path / "run", model=model, max_steps=1), SilentObserver()).final_dir
    assert all(".layers.1." in name for name in load_file(final / "adapter_model.safetensors"))
    bare = without_adapter(load_model(final))
    assert bare.config.adapter is None
