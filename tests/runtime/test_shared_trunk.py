"""`ppo.shared_trunk`: one model with two heads learns what two losses say, in one process and by plan."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_rl import random_rollout, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from meshift.algorithms.losses import PolicyAndValueLoss, PolicyLoss, ValueLoss
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.errors import InputError
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.two_heads import add_value_head, one_head_of
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import build_ppo_job, run_ppo
from meshift.training.engine import TrainingEngine
from meshift.training.readings import LogprobsAndValues, TokenLogprobs, TokenValues

SHARED = {"ppo": {"shared_trunk": True, "vf_coef": 0.5, "num_mini_batches": 2, "missing_eos_penalty": 1.0}}
SMOOTH = {"learning_rate": 0.01, "adam_epsilon": 1e-3}
PLANS = {
    "data and tensor": {
        "actor": {
            "generate": {"mesh": "0-3", "layout": "d4t1p1"},
            "train": {"mesh": "0-3", "layout": "d2t2p1"},
        },
        "reference": {"infer": {"mesh": "0,1", "layout": "d2t1p1"}},
    },
    "stages, whose state is shared out": {
        "actor": {"generate": {"mesh": "0", "layout": "d1"}, "train": {"mesh": "0-3", "layout": "d2t1p2s"}},
        "reference": {"infer": {"mesh": 1, "layout": "d1"}},
    },
}


def two_heads():
    model = add_value_head(tiny_model())
    with torch.no_grad():
        model.head.value.weight.normal_(generator=torch.Generator().manual_seed(3))
    return model


def taught(batch):
    """A rollout with old values, returns and advantages."""
    lengths, draw = batch["completion_lengths"].values, torch.Generator().manual_seed(5)

    def numbers(more):
        return Ragged(torch.randn(int((lengths + more).sum()), generator=draw), lengths + more)

    return batch.union(Batch({"values": numbers(1), "returns": numbers(0), "advantages": numbers(0)}))


def losses():
    policy = PolicyLoss(reading=TokenLogprobs(with_entropy=True, entropy_gradient=True), entropy_coef=0.02)
    return policy, ValueLoss(cliprange_value=0.3)


@pytest.mark.parametrize("share", [True, False])
def test_both_readings_of_one_pass_are_those_of_two(share):
    model, batch = two_heads(), random_rollout()
    both = LogprobsAndValues(logprobs=TokenLogprobs(with_entropy=True), values=TokenValues())
    config = TrainableConfig(max_tokens_per_micro_batch=24, share_prefixes=share)
    engine = TrainingEngine(model, config, trainable=False)
    found = engine.infer(both, batch)
    for reading, part in ((both.logprobs, model), (both.values, one_head_of(model, "value"))):
        alone = TrainingEngine(part, config, trainable=False).infer(reading, batch)
        for key, field in alone.fields.items():
            torch.testing.assert_close(found[key].values, field.values, atol=1e-6, rtol=1e-5)
            assert found[key].lengths.tolist() == field.lengths.tolist()


def test_the_gradient_is_that_of_the_weighted_sum_of_two_losses():
    batch, (policy, value) = taught(random_rollout()), losses()
    model = two_heads()
    engine = TrainingEngine(model, TrainableConfig(max_tokens_per_micro_batch=24), trainable=True)
    engine.accumulate(PolicyAndValueLoss(policy=policy, value=value, vf_coef=0.3), batch)
    found = {name: p.grad for name, p in model.named_parameters()}
    twin, total = two_heads(), torch.zeros(())
    for row in batch.split([[i] for i in range(len(batch))]):  # each alone, by plain autograd
        tokens, length = row["tokens"].values, int(row["completion_lengths"].values[0])
        hidden = twin(tokens, packed_positions([len(tokens)]), PackedAttention([len(tokens)]))
        last = hidden[len(tokens) - length - 1 :]
        logp = twin.head(last[:-1]).log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        lengths = row["completion_lengths"].values
        outputs = {
            "new_logprobs": Ragged(logp.gather(1, tokens[-length:, None])[:, 0], lengths),
            "entropy": Ragged(entropy, lengths),
            "new_values": Ragged(twin.head.value(last), lengths + 1),
        }
        total = total + policy(outputs, row).total + 0.3 * value(outputs, row).total
    (total / int(batch["completion_lengths"].values.sum())).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.fixture(scope="module")
def make_run(ppo_config_on_disk, actor_folder):
    def make(output_dir, **sections):
        actor = {"model_name_or_path": str(actor_folder), "logits_chunk": 5, **SMOOTH}
        return ppo_config_on_disk(output_dir, **{"actor": actor, "max_steps": 3, **SHARED, **sections})

    return make


@pytest.fixture(scope="module")
def alone(make_run, tmp_path_factory):
    return run_ppo(make_run(tmp_path_factory.mktemp("alone") / "run"), SilentObserver())


def rows_of(result):
    return [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(result, name):
    return load_file(result.output_dir / name / "model.safetensors")


def test_one_run_leaves_a_policy_and_a_critic_with_the_same_trunk(alone):
    for row in rows_of(alone):
        assert "timing_s/train_critic" not in row
        assert row["critic/vf_loss"] > 0
        assert row["actor/grad_norm"] > 0
    policy = AutoModelForCausalLM.from_pretrained(alone.output_dir / "final")
    critic = AutoModelForSequenceClassification.from_pretrained(alone.output_dir / "final_critic")
    assert critic.score.weight.abs().sum() > 0
    trunk = dict(policy.model.named_parameters())
    assert all(torch.equal(trunk[name], p) for name, p in critic.model.named_parameters())
    assert "score.weight" not in weights_of(alone, "final")


@pytest.mark.parametrize("name", PLANS)
def test_four_processes_learn_with_two_heads_what_one_learns(make_run, alone, tmp_path, name):
    spread = run_ppo(make_run(tmp_path / "spread", plan=PLANS[name]), SilentObserver())
    for ours, theirs in zip(rows_of(spread), rows_of(alone), strict=True):
        for key in ("actor/pg_loss", "critic/vf_loss", "actor/grad_norm", "objective/kl", "reward/mean"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-4), key
    for folder in ("final", "final_critic"):
        ours, theirs = weights_of(spread, folder), weights_of(alone, folder)
        assert ours.keys() == theirs.keys()
        for parameter, weight in theirs.items():
            torch.testing.assert_close(ours[parameter], weight, atol=2e-5, rtol=1e-4, msg=parameter)


@pytest.mark.parametrize("sections", [{}, {"reference": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3}}])
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(make_run, tmp_path, sections):
    whole = run_ppo(make_run(tmp_path / "whole", **sections), SilentObserver())
    run_ppo(make_run(tmp_path / "run", **sections, max_steps=2, save_steps=1), SilentObserver())
    (tmp_path / "run" / "final").rename(tmp_path / "old")
    again = run_ppo(make_run(tmp_path / "run", **sections, save_steps=1, resume=True), SilentObserver())
    for folder in ("final", "final_critic"):
        ours, theirs = weights_of(again, folder), weights_of(whole, folder)
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


def test_adapters_and_the_head_of_values_learn_and_nothing_else(make_run, tmp_path, actor_folder):
    actor = {"model_name_or_path": str(actor_folder), **SMOOTH, "lora": {"rank": 2}}
    job = build_ppo_job(make_run(tmp_path / "run", actor=actor))
    learns = {name for name, p in job.roles["actor"].model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in learns} == {"lora_a", "lora_b", "weight"}
    assert [name for name in learns if name.endswith("weight")] == ["head.value.weight"]
    result = run_ppo(make_run(tmp_path / "run", actor=actor, max_steps=1), SilentObserver())
    assert (result.output_dir / "final" / "adapter_model.safetensors").is_file()
    assert "base_model.model.score.weight" in load_file(
        result.output_dir / "final_critic" / "adapter_model.safetensors"
    )


def test_a_critic_that_would_not_be_used_is_refused(make_run, tmp_path):
    with pytest.raises(InputError, match=r"`critic` is set, but with `ppo\.shared_trunk` it is a head"):
        make_run(tmp_path / "run", critic={"learning_rate": 1e-3})
