"""`meshift grpo` and its kin on a tiny model from disk: folder, metrics, dry run, and resuming bit for bit."""

from pathlib import Path

import pytest
from broken_runs import KEPT, Notes, changed, end_of
from transformers import AutoModelForCausalLM

from meshift.config.loading import make_config
from meshift.config.policy_runs import DAPORunConfig, GRPORunConfig
from meshift.errors import DataError, ModelError
from meshift.runtime.memory import held_models
from meshift.runtime.observer import SilentObserver
from meshift.runtime.policy_run import CRITIC_FREE, METHODS, build_policy_job, check_policy, run_policy

NAMES = """
actor/pg_loss actor/ppo_kl actor/pg_clipfrac actor/pg_clipfrac_low actor/pg_clipfrac_high actor/entropy
actor/grad_norm actor/lr actor/early_stop actor/advantages/mean
reward/mean reward/std reward/odd reward/reward_model reward/frac_reward_zero_std
response_length/mean response_length/max response_length/min response_length/clip_ratio
objective/no_score_fraction objective/trained_fraction
timing_s/rollout timing_s/score timing_s/reward_functions timing_s/advantages timing_s/train_actor
perf/tokens_per_s perf/time_per_step perf/mfu perf/peak_tflops perf/generated_tokens
sync/logprob_diff_max sync/version training/global_step
"""
WITH_REFERENCE = ["objective/kl", "objective/kl_coef", "objective/rlhf_reward", "timing_s/reference"]
OF_THE_METHOD = {
    "grpo": ["actor/kl_loss", "reward/group_std", *WITH_REFERENCE],
    "dapo": ["timing_s/sampling", "sampling/num_rounds", "reward/overlong_penalty", "kept/reward/mean"],
    "gspo": ["timing_s/old_logprobs", "reward/group_std"],
    "rloo": WITH_REFERENCE,
    "reinforce_pp": ["objective/returns/mean", *WITH_REFERENCE],
    "remax": ["timing_s/greedy_baseline", "greedy/reward/mean", "greedy/reward/odd", *WITH_REFERENCE],
}
REWARDS = """
def odd(completion_ids, **columns):
    return [float(ids[0] % 2) for ids in completion_ids]
"""


@pytest.fixture(scope="session")
def odd_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "odd.py"
    path.write_text(REWARDS, encoding="utf-8")
    return f"{path}:odd"


@pytest.fixture(scope="session")
def policy_config_on_disk(actor_folder, reward_folder, prompts_file, odd_file):
    """`policy_config_on_disk(schema, output_dir, **sections)`: a reward model and a function, two steps, fp32."""

    def make(schema, output_dir, **sections):
        values = {
            "output_dir": str(output_dir),
            "max_steps": 2,
            "dtype": "float32",
            "num_logged_samples": 3,
            "num_report_prompts": 1,
            "report_to": [],
            "data": {"dataset_name": prompts_file, "batch_size": 4},
            "actor": {"model_name_or_path": str(actor_folder), "learning_rate": 1e-3},
            "reward": {
                "model_name_or_path": str(reward_folder),
                "weight": 0.0,
                "functions": [{"function": odd_file}],
            },
            "generation": {"max_completion_length": 5, "num_generations": 2, "top_k": 9},
        }
        return make_config(schema, values | sections)

    return make


@pytest.mark.parametrize("schema", METHODS, ids=lambda schema: schema.SECTION)
def test_a_run_of_each_method_leaves_a_model_and_its_metrics(policy_config_on_disk, tmp_path, read_lines, schema):
    result = run_policy(policy_config_on_disk(schema, tmp_path / "run"), SilentObserver())
    expected = {*NAMES.split(), *OF_THE_METHOD.get(schema.SECTION, ())}
    rows = read_lines(result.output_dir / "metrics.jsonl")
    assert [row["training/global_step"] for row in rows] == [1, 2]
    for row in rows:
        assert not expected - set(row)
        assert not [name for name in expected if row[name] is None]
        assert row["sync/logprob_diff_max"] < 1e-4
    samples = [row for row in read_lines(result.output_dir / "samples.jsonl") if "fixed" not in row]
    assert [row["step"] for row in samples] == [1] * 3 + [2] * 3
    assert samples[0]["prompt"] == samples[1]["prompt"] != samples[2]["prompt"], "groups are neighbours (trap 4)"
    AutoModelForCausalLM.from_pretrained(result.final_dir)
    assert not (result.output_dir / "final_critic").exists()


MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}


@pytest.mark.parametrize(
    ("section", "dtype", "sections"),
    [
        ("grpo", "bfloat16", {"reference": MOVING, "grpo": {"num_iterations": 2, "num_mini_batches": 2}}),
        ("dapo", "float32", {"dapo": {"num_mini_batches": 2}}),
        ("remax", "float32", {}),
        ("online_dpo", "float32", {"online_dpo": {"steps_per_round": 3}}),
        ("raft", "bfloat16", {"raft": {"kl_coef": 0.1}, "reference": MOVING}),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(policy_config_on_disk, tmp_path, section, dtype, sections):
    """DAPO's further prompts come from a walk whose place is remembered: without it, others would be drawn."""
    schema = next(schema for schema in CRITIC_FREE if section == schema.SECTION)
    given = {"dtype": dtype, **sections, **(KEPT | {"max_steps": 4})}
    whole = run_policy(policy_config_on_disk(schema, tmp_path / "whole", **given), SilentObserver())
    config = policy_config_on_disk(schema, tmp_path / "run", **given)
    with pytest.raises(KeyboardInterrupt):
        run_policy(config, Notes(3))
    resumed = run_policy(changed(config, resume=True), SilentObserver())
    assert end_of(resumed.output_dir) == end_of(whole.output_dir)
    if section == "dapo":
        rounds = [row["sampling/num_rounds"] for row in end_of(whole.output_dir)[1]]
        assert max(rounds[:2]) > 1 < max(rounds[2:]), "further prompts must be drawn before and after"


def test_further_prompts_would_come_twice_in_a_step_or_share_a_stream_or_forget_their_place(
    policy_config_on_disk, tmp_path
):
    config = policy_config_on_disk(DAPORunConfig, tmp_path, data={"dataset_name": "unused", "batch_size": 2})
    source, further = sources(config)
    own = {int(row[0]) for row in source.next_batch(3)["prompts"].rows()}
    first, second = further(3, 1, 2), further(3, 2, 1)
    drawn = [int(row[0]) for batch in (first, second) for row in batch["prompts"].rows()]
    assert drawn[::2] == drawn[1::2], "a prompt's completions are neighbours"
    assert len({*drawn[::2], *own}) == 5, "five different prompts in one step of a data set of five"
    index = [source.next_batch(3)["index"], first["index"], second["index"], further(4, 1, 2)["index"]]
    numbers = [int(number) for part in index for number in part.values]
    assert len(set(numbers)) == len(numbers)
    place = further.state_dict()
    expected = further(5, 1, 2)["prompts"].values.tolist()
    _, other = sources(config)
    other.load_state_dict(place)
    assert other(5, 1, 2)["prompts"].values.tolist() == expected
    assert len(further(6, 1, 9)) == 18, "where every prompt was drawn, they come again"


def sources(config):
    from meshift.data.prompts import Prompt
    from meshift.runtime.rollout_prompts import FurtherPrompts, PromptSource

    prompts = [Prompt(tokens=[i], text=str(i), columns={}) for i in range(5)]
    source = PromptSource(config, prompts, ())
    return source, FurtherPrompts(source, config.seed)


def test_reward_functions_are_told_the_same_step_in_every_round_and_for_greedy_completions(
    policy_config_on_disk, tmp_path
):
    for schema in (s for s in METHODS if s.SECTION in ("dapo", "remax")):
        job = build_policy_job(policy_config_on_disk(schema, tmp_path / schema.SECTION))
        loop = next(call for call in job.graph.calls if hasattr(call, "graph"))
        scored = next(call for call in loop.graph.calls if call.name == "reward_functions")
        assert "step" in scored.reads
        batch = job.next_batch(1).select(loop.reads)
        assert set(loop.feed(batch, [])["step"].values.tolist()) == {1}


def test_a_dry_run_shows_the_batch_arithmetic_and_no_reference_that_is_not_held(policy_config_on_disk, tmp_path):
    rows = dict(check_policy(policy_config_on_disk(GRPORunConfig, tmp_path, grpo={"num_iterations": 2})))
    assert rows["batch"] == "4 prompts x 2 generations = 8 sequences -> 2 x 1 updates of 8 sequences"
    assert {"actor model", "reference model", "reward model", "memory"} <= set(rows)
    config = policy_config_on_disk(GRPORunConfig, tmp_path, grpo={"kl_coef": 0.0})
    rows = dict(check_policy(config))
    assert "reference model" not in rows
    assert [(one.role, one.trained is not None) for one in held_models(config)] == [
        ("actor", True),
        ("reward", False),
    ]


def test_what_is_wrong_is_found_before_weights_are_read(policy_config_on_disk, tmp_path, actor_folder):
    gone = policy_config_on_disk(GRPORunConfig, tmp_path, reference={"model_name_or_path": "/no/model"})
    no_reward = policy_config_on_disk(GRPORunConfig, tmp_path, reward={"model_name_or_path": str(actor_folder)})
    long = policy_config_on_disk(
        GRPORunConfig, tmp_path, generation={"max_completion_length": 60, "num_generations": 2}
    )
    for config, error, words in (
        (gone, ModelError, "no model folder"),
        (no_reward, ModelError, "it is no reward model"),
        (long, DataError, "takes 64"),
    ):
        with pytest.raises(error, match=words):
            check_policy(config)
    assert not list(Path(tmp_path).iterdir())
