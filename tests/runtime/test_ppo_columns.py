"""Data columns through a PPO run: any name reaches the reward functions, and messages stay messages."""

import json

import pytest

from meshift.errors import DataError
from meshift.models.hf.load import load_tokenizer
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import build_ppo_job, check_ppo, run_ppo
from meshift.step import run_step

NAMES = ("index", "values", "versions", "tokens", "scores", "advantages", "column/tokens", "x.lengths", "text")


@pytest.fixture
def make_config(ppo_config_on_disk, tmp_path):
    """`make_config(rows, code, **sections)`: a run on these rows whose one function is `judge` of the code."""

    def make(rows, code, **sections):
        data, rewards = tmp_path / "data.jsonl", tmp_path / "judges.py"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rewards.write_text(code, encoding="utf-8")
        sections = {
            "max_steps": 1,
            "data": {"dataset_name": str(data), "batch_size": 4},
            "reward": {"functions": [{"function": f"{rewards}:judge"}]},
        } | sections
        return ppo_config_on_disk(tmp_path / "run", **sections)

    return make


ROWS = [{"prompt": text} for text in ("the film was", "a story", "the", "it was not")]


def test_a_column_may_have_the_name_of_any_field(make_config, read_lines):
    code = (
        f"def judge(completions, **columns):\n    return [sum(c) for c in zip(*(columns[n] for n in {NAMES}))]\n"
    )
    rows = [row | {name: 10**k for k, name in enumerate(NAMES)} for row in ROWS]
    result = run_ppo(make_config(rows, code), SilentObserver())
    (metrics,) = read_lines(result.output_dir / "metrics.jsonl")
    assert metrics["reward/judge"] == pytest.approx(111_111_111, rel=1e-6)


@pytest.mark.parametrize("name", ["completions", "completion_ids", "prompts"])
def test_a_column_with_an_arguments_name_is_refused_before_the_run(make_config, name):
    rows = [row | {name: "x"} for row in ROWS]
    config = make_config(rows, "def judge(completions):\n    return [0.0 for _ in completions]\n")
    for start in (check_ppo, build_ppo_job):
        with pytest.raises(DataError, match=rf"data\.jsonl: the column '{name}' is reserved"):
            start(config)


def test_any_column_is_accepted_where_no_function_reads_it(make_config, reward_folder):
    rows = [row | {"completions": "x", "prompts": 1} for row in ROWS]
    job = build_ppo_job(make_config(rows, "", reward={"model_name_or_path": str(reward_folder)}))
    assert len(run_step(job.graph, job.roles, job.next_batch(0), 0).batch) == 8


CHAT = """
def judge(prompts, completions, **columns):
    assert all(p[-1] == {"role": "user", "content": "the film"} for p in prompts)
    assert all([m["role"] for m in c] == ["assistant"] for c in completions)
    return [1.0 for c in completions if isinstance(c[0]["content"], str)]
"""


def test_messages_reach_the_functions_as_messages(make_config, actor_folder, monkeypatch):
    rows = [{"prompt": [{"role": "user", "content": "the film"}]}] * 4
    config = make_config(rows, CHAT)
    chatty = load_tokenizer(actor_folder)
    chatty.chat_template = "{% for m in messages %}{{ m.content }} . {% endfor %}"
    monkeypatch.setattr("meshift.runtime.rollout_run.open_tokenizer", lambda name: chatty)
    job = build_ppo_job(config)
    outcome = run_step(job.graph, job.roles, job.next_batch(0), 0)
    assert outcome.metrics["reward/judge"] == 1.0


def test_a_stop_string_may_be_a_special_token(make_config):
    """`<unk>` is token 0; texts for rewards and samples are without it, so it could never match there."""
    generation = {"max_completion_length": 8, "num_generations": 16, "stop_strings": ["<unk>"]}
    code = "def judge(completions):\n    return [-1.0 if '<unk>' in c else 1.0 for c in completions]\n"
    job = build_ppo_job(make_config(ROWS, code, generation=generation))
    outcome = run_step(job.graph, job.roles, job.next_batch(0), 0)
    batch = outcome.batch
    lengths = batch["completion_lengths"].values.tolist()
    completions = [row[-n:].tolist() for row, n in zip(batch["tokens"].rows(), lengths, strict=True)]
    stopped = [c for c in completions if 0 in c]
    assert stopped
    assert all(c.index(0) == len(c) - 1 for c in stopped)
    assert any(len(c) < 8 for c in stopped)
    assert outcome.metrics["reward/judge"] == 1.0
    assert all("<unk>" not in sample["completion"] for sample in job.samples(0, batch))


def test_a_completion_that_nothing_scored_would_be_logged_with_a_reward_of_zero(make_config, read_lines, caplog):
    code = "def judge(prompts, completions):\n    return [None if p == 'a story' else 2.0 for p in prompts]\n"
    run = run_ppo(make_config(ROWS, code, num_logged_samples=8), SilentObserver()).output_dir
    rows = [row for row in read_lines(run / "samples.jsonl") if "reward" in row]  # but for the fixed prompts
    rewards = {row["prompt"]: row["reward"] for row in rows}
    assert rewards == {"the film was": 2.0, "a story": None, "the": 2.0, "it was not": 2.0}
    assert read_lines(run / "metrics.jsonl")[0]["reward/mean"] == 2.0
    assert "no reward function gave any" not in caplog.text


def test_a_run_that_nothing_rewards_would_say_nothing(make_config, read_lines, caplog):
    code = "def judge(completions):\n    return [None] * len(completions)\n"
    run = run_ppo(make_config(ROWS, code, max_steps=2), SilentObserver()).output_dir
    assert caplog.text.count("no reward function gave any of the 8 completions of step 1 a number") == 1
    rows = read_lines(run / "metrics.jsonl")
    assert [row["objective/no_score_fraction"] for row in rows] == [1.0, 1.0]
    assert not [key for row in rows for key in row if key.startswith("reward/")]
