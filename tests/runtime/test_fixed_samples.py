"""The report's prompts are completed through the run, and the run does not notice."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from meshift.batch import Batch, Ragged
from meshift.runtime.environment import ENVIRONMENT, write_environment
from meshift.runtime.fixed_samples import FixedSamples, reward_judge, sampled_steps
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import build_ppo_job, run_ppo


def files_of(run):
    names = ("final/model.safetensors", "final_critic/model.safetensors")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("timing_s/", "perf/t", "perf/mfu", "perf/peak", "perf/predicted")  # with what the process had before
    kept = [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]
    return [(run / name).read_bytes() for name in names], kept


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ppo_config_on_disk):
    """The same three steps with the report's prompts and without."""
    found = []
    for count in (2, 0):
        folder = tmp_path_factory.mktemp("fixed") / "run"
        run_ppo(
            ppo_config_on_disk(folder, max_steps=3, num_report_prompts=count, report_samples_every=2),
            SilentObserver(),
        )
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        found.append(
            (folder, [row for row in rows if row.get("fixed")], [row for row in rows if "fixed" not in row])
        )
    return found


def test_training_is_bit_identical_with_and_without(runs):
    (one, _, samples), (other, none, others) = runs
    assert files_of(one) == files_of(other)
    assert samples == others
    assert none == []


def test_the_same_prompts_are_completed_before_between_and_at_the_end(runs):
    _, fixed, _ = runs[0]
    assert [(row["step"], row["index"]) for row in fixed] == [(s, i) for s in (0, 2, 3) for i in range(2)]
    assert len({row["prompt"] for row in fixed}) == 2
    assert all(row["completion"] or row["truncated"] is False for row in fixed)


def test_same_weights_give_the_same_texts_and_other_streams_than_training(tmp_path, ppo_config_on_disk):
    config = ppo_config_on_disk(tmp_path / "run")
    job = build_ppo_job(config)
    task = job.graph.calls[0].task
    fixed = FixedSamples(
        role=job.roles["actor"], task=task, prompts=[[2, 3]] * 3, decode=str, steps=frozenset({0})
    )
    assert fixed.rows(0) == fixed.rows(0)
    assert fixed.rows(1) == []
    drawn = replace(fixed, task=replace(task, seed=task.seed + 1))
    assert fixed.rows(0) != drawn.rows(0), "the run's seed reaches them"


def test_a_reward_model_alone_judges_them_as_transformers_does(tmp_path, ppo_config_on_disk, reward_folder):
    """Reward functions would be called more often than training calls them, so with them there is no reward."""
    config = ppo_config_on_disk(tmp_path / "run", reward={"model_name_or_path": str(reward_folder), "weight": 3.0})
    run_ppo(config, SilentObserver())
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(isinstance(row["reward"], float) for row in rows if row.get("fixed"))
    judge = reward_judge(config.reward, build_ppo_job(config).roles["reward"])
    texts = [[2, 3, 4], [5, 6, 7, 8, 1], [3]]
    twin = AutoModelForSequenceClassification.from_pretrained(reward_folder, num_labels=1).eval()
    with torch.no_grad():
        expected = [
            3.0 * float(twin.score(twin.model(torch.tensor([text])).last_hidden_state)[0, -1]) for text in texts
        ]
    assert judge(Batch({"tokens": Ragged.from_rows(texts, torch.int64)})) == pytest.approx(expected, abs=1e-4)
    assert reward_judge(ppo_config_on_disk(tmp_path).reward, object()) is None


def test_a_reward_that_is_no_number_is_none_and_its_sample_is_named(tmp_path, ppo_config_on_disk, caplog):
    job = build_ppo_job(ppo_config_on_disk(tmp_path / "run"))
    fixed = FixedSamples(
        role=job.roles["actor"],
        task=job.graph.calls[0].task,
        prompts=[[2, 3], [4, 5], [6, 7]],
        decode=str,
        steps=frozenset({4}),
        judge=lambda drawn: [1.0, math.nan, math.inf],
    )
    assert [row["reward"] for row in fixed.rows(4)] == [1.0, None, None]
    [nan, infinite] = [record.getMessage() for record in caplog.records]
    assert nan.startswith("the reward model gives nan to the report's sample 1 after 4 steps ('[4, 5]')")
    assert "gives inf to the report's sample 2" in infinite


@pytest.mark.parametrize(
    ("max_steps", "every", "expected"),
    [(1, None, {0, 1}), (16, None, {0, 4, 8, 12, 16}), (10, 3, {0, 3, 6, 9, 10}), (4, 100, {0, 4})],
)
def test_first_and_last_step_are_always_among_the_sampled(max_steps, every, expected):
    assert sampled_steps(max_steps, every) == expected


def test_environment_is_json_and_names_no_path(tmp_path):
    write_environment(tmp_path)
    facts = json.loads((tmp_path / ENVIRONMENT).read_text())
    assert {"meshift", "python", "torch", "processor", "threads", "device"} <= set(facts)
    assert not [value for value in facts.values() if str(value).startswith("/")]
