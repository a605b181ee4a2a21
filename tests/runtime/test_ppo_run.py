"""`meshift ppo` on a tiny model from disk: its folder, its metrics, its numbers, and that it can be repeated."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from meshift.errors import ModelError, RewardError
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.hf.load import load_model, load_tokenizer
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import build_ppo_job, check_ppo, role_models, run_ppo
from meshift.step import run_step

TOKENS = [2, 5, 9, 3, 1, 4]
# The ecosystem's names (shared/design/conventions.md), as far as they mean something in one process.
NAMES = """
actor/pg_loss actor/ppo_kl actor/pg_clipfrac actor/entropy actor/grad_norm actor/lr actor/early_stop
critic/vf_loss critic/vf_clipfrac critic/vf_explained_var critic/values/mean critic/returns/mean
critic/advantages/mean reward/mean reward/std reward/answered reward/short reward/reward_model
objective/kl objective/kl_coef objective/rlhf_reward
response_length/mean response_length/max response_length/min response_length/clip_ratio
timing_s/rollout timing_s/score timing_s/reward_functions timing_s/reference timing_s/values
timing_s/advantages timing_s/train_actor timing_s/train_critic
perf/tokens_per_s perf/time_per_step perf/mfu perf/peak_tflops sync/logprob_diff_max training/global_step
"""


class Recorder(SilentObserver):
    """Remembers what it heard."""

    def __init__(self):
        self.heard = []

    def on_start(self, total_steps, title):
        self.heard.append(("start", total_steps))

    def on_call(self, step, name):
        self.heard.append((step, name))

    def on_step(self, step, metrics):
        self.heard.append((step, "done"))

    def on_finish(self):
        self.heard.append("finish")


@pytest.fixture(scope="module")
def finished(ppo_config_on_disk, tmp_path_factory):
    """One run of two steps: its config, its result and what its observer heard."""
    config, observer = ppo_config_on_disk(tmp_path_factory.mktemp("runs") / "one"), Recorder()
    return config, run_ppo(config, observer), observer.heard


def test_a_run_leaves_the_files_of_the_convention(finished, read_lines):
    _, result, _ = finished
    names = {path.name for path in result.output_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "samples.jsonl", "final", "final_critic", "tensorboard"} <= names
    assert [row["training/global_step"] for row in read_lines(result.output_dir / "metrics.jsonl")] == [1, 2]
    assert list((result.output_dir / "tensorboard").iterdir())


def test_every_step_logs_every_metric_under_the_ecosystems_names(finished, read_lines):
    for row in read_lines(finished[1].output_dir / "metrics.jsonl"):
        missing = set(NAMES.split()) - set(row)
        assert not missing
        assert not [name for name in NAMES.split() if row[name] is None]
        assert row["response_length/min"] <= row["response_length/mean"] <= row["response_length/max"] <= 6


def test_sampler_and_trainer_agree_on_every_token(finished, read_lines):
    for row in read_lines(finished[1].output_dir / "metrics.jsonl"):
        assert row["sync/logprob_diff_max"] < 1e-4
    assert read_lines(finished[1].output_dir / "metrics.jsonl")[0]["objective/kl"] == pytest.approx(0, abs=1e-4)


def test_the_reward_is_the_weighted_sum_of_model_and_functions(finished, read_lines):
    for row in read_lines(finished[1].output_dir / "metrics.jsonl"):
        parts = 3.0 * row["reward/reward_model"] + 0.5 * row["reward/answered"] + 2.0 * row["reward/short"]
        assert row["reward/mean"] == pytest.approx(parts, rel=1e-4)
        assert row["reward/short"] == pytest.approx(-row["response_length/mean"])


def test_samples_show_prompt_completion_and_reward(finished, read_lines):
    rows = [row for row in read_lines(finished[1].output_dir / "samples.jsonl") if "fixed" not in row]
    assert [row["step"] for row in rows] == [1] * 3 + [2] * 3
    assert [row["index"] for row in rows] == [0, 1, 2, 8, 9, 10], "no two sequences share a random stream"
    for row in rows:
        assert set(row) >= {"prompt", "completion", "reward", "truncated"}
        assert "<eos>" not in row["completion"]
    assert rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]


def test_the_observer_hears_the_run_in_order(finished):
    _, _, heard = finished
    calls = ["rollout", "score", "reward_functions", "reference", "values", "advantages"]
    calls += ["train_actor", "train_critic", "done"]
    steps = [(step, name) for step in (0, 1) for name in calls]
    assert heard == [("start", 2), *steps, (1, "saving"), "finish"]


def logits_of(model):
    with torch.no_grad():
        rows = model(torch.tensor(TOKENS), packed_positions([len(TOKENS)]), PackedAttention([len(TOKENS)]))
        return model.head(rows)


def test_what_is_saved_loads_in_transformers_with_the_same_logits(finished, actor_folder):
    final = finished[1].final_dir
    theirs = AutoModelForCausalLM.from_pretrained(final)
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits, logits_of(load_model(final)), atol=1e-5, rtol=0)
    assert (logits - logits_of(load_model(actor_folder))).abs().max() > 1e-3, "it was trained"
    assert load_tokenizer(final).get_vocab() == load_tokenizer(actor_folder).get_vocab()
    critic = AutoModelForSequenceClassification.from_pretrained(final.with_name("final_critic"), num_labels=1)
    ours = load_model(final.with_name("final_critic"), head="value")
    with torch.no_grad():
        values = critic.score(critic.model(input_ids=torch.tensor([TOKENS])).last_hidden_state)[0, :, 0]
    torch.testing.assert_close(values, logits_of(ours), atol=1e-5, rtol=0)


def untimed(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("timing_s/", "perf/"))} for row in rows]


def test_the_same_seed_repeats_every_number_and_byte_and_another_does_not(
    finished, ppo_config_on_disk, tmp_path, read_lines
):
    first = finished[1]
    again = run_ppo(ppo_config_on_disk(tmp_path / "again"), SilentObserver())
    other = run_ppo(ppo_config_on_disk(tmp_path / "other", seed=1), SilentObserver())
    metrics = [untimed(read_lines(r.output_dir / "metrics.jsonl")) for r in (first, again, other)]
    assert metrics[0] == metrics[1]
    assert metrics[0] != metrics[2]
    for name in ("final", "final_critic"):
        one, two = ((r.output_dir / name / "model.safetensors").read_bytes() for r in (first, again))
        assert one == two
    assert read_lines(first.output_dir / "samples.jsonl") == read_lines(again.output_dir / "samples.jsonl")
    assert read_lines(first.output_dir / "samples.jsonl") != read_lines(other.output_dir / "samples.jsonl")


def test_several_completions_of_a_prompt_keep_prompt_length_reward_and_columns_together(
    ppo_config_on_disk, tmp_path, rewards_file, prompts_file, actor_folder, read_lines
):
    """Trap 4: rows are prompts-major, p0 p0 p0 p1 p1 p1, in every key of the batch."""
    functions = [{"function": f"{rewards_file}:answered"}]
    config = ppo_config_on_disk(
        tmp_path,
        reward={"functions": functions},
        generation={"num_generations": 3, "max_completion_length": 5},
        data={"dataset_name": prompts_file, "batch_size": 5},
    )
    job = build_ppo_job(config)
    asked = job.next_batch(0)
    batch = run_step(job.graph, job.roles, asked, 0).batch
    tokenizer = load_tokenizer(actor_folder)
    by_text = {row["prompt"]: row for row in read_lines(Path(prompts_file))}
    texts = asked.columns["column/prompt"]
    assert texts == [t for t in texts[::3] for _ in range(3)]
    assert len(set(texts)) == 5
    assert asked["index"].values.tolist() == list(range(15))
    lengths = batch["completion_lengths"].values.tolist()
    for i, (text, row, length) in enumerate(zip(texts, batch["tokens"].rows(), lengths, strict=True)):
        assert row[: len(row) - length].tolist() == tokenizer(text)["input_ids"]
        assert asked.columns["column/answer"][i] == by_text[text]["answer"] == float(batch["scores"].values[i])
        assert asked.columns["column/hints"][i] == by_text[text]["hints"]
        assert length == len(batch["logprobs"].rows()[i])
        assert bool(batch["truncated"].values[i]) == (1 not in row[-length:].tolist())


def test_a_dry_run_shows_the_batch_arithmetic(ppo_config_on_disk, tmp_path):
    rows = dict(check_ppo(ppo_config_on_disk(tmp_path / "never", max_steps=5)))
    assert rows["batch"] == "4 prompts x 2 generations = 8 sequences -> 1 x 2 updates of 4 sequences"
    assert "4096 tokens on each data rank" in rows["micro-batches"]
    assert rows["prompts"].startswith("5 (0 over data.max_prompt_length")
    assert rows["steps"] == "5, 4.00 passes over the prompts"
    assert not (tmp_path / "never").exists()


def test_the_critic_starts_from_the_reward_model_and_the_reference_from_the_actor(ppo_config_on_disk, tmp_path):
    config = ppo_config_on_disk(tmp_path)
    names = role_models(config)
    assert names["critic"] == names["reward"] == config.reward.model_name_or_path
    assert names["reference"] == names["actor"] == config.actor.model_name_or_path


def test_epochs_over_the_data_become_steps(ppo_config_on_disk, tmp_path):
    config = ppo_config_on_disk(tmp_path, max_steps=None, num_train_epochs=2)
    assert build_ppo_job(config).max_steps == 3, "2 x 5 prompts in steps of 4"


def test_a_reward_model_with_another_tokenizer_is_refused(ppo_config_on_disk, make_folder, tmp_path):
    other = make_folder("reward", words=("the", "film", "was", "good", "bad"))
    config = ppo_config_on_disk(tmp_path / "run", reward={"model_name_or_path": str(other)})
    for start in (check_ppo, build_ppo_job):
        with pytest.raises(ModelError, match="has another tokenizer than the actor"):
            start(config)


def test_a_critic_of_another_vocabulary_is_refused(ppo_config_on_disk, make_folder, tmp_path):
    other = make_folder("reward", words=("the", "film"))
    config = ppo_config_on_disk(tmp_path / "run", critic={"model_name_or_path": str(other)})
    with pytest.raises(ModelError, match="has another tokenizer than the actor"):
        build_ppo_job(config)


def test_a_reward_function_that_fails_ends_the_run_with_its_name_and_line(ppo_config_on_disk, tmp_path):
    path = tmp_path / "bad_rewards.py"
    path.write_text("def judge(completions):\n    return 1 / 0\n", encoding="utf-8")
    config = ppo_config_on_disk(tmp_path / "run", reward={"functions": [{"function": f"{path}:judge"}]})
    with pytest.raises(RewardError, match=r"judge raised ZeroDivisionError: .*bad_rewards\.py, line 2"):
        run_ppo(config, SilentObserver())
    assert not (tmp_path / "run" / "final").exists()


def test_an_ema_reference_of_another_shape_is_refused(ppo_config_on_disk, make_folder, tmp_path):
    other = make_folder("lm", hidden_size=24)
    reference = {"model_name_or_path": str(other), "sync_ref_model": True}
    config = ppo_config_on_disk(tmp_path / "run", reference=reference)
    with pytest.raises(ModelError, match="differ in their parameters' shapes"):
        check_ppo(config)
