"""`meshift sft` on a tiny model: it learns to imitate, and what it saves is usable."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from meshift.errors import ConfigError, DataError
from meshift.models.hf.load import load_tokenizer
from meshift.runtime.observer import SilentObserver
from meshift.runtime.sft_run import build_sft_job, check_sft, run_sft


@pytest.fixture(scope="module")
def finished(sft_config_on_disk, tmp_path_factory):
    return run_sft(sft_config_on_disk(tmp_path_factory.mktemp("runs") / "one", eval_steps=6), SilentObserver())


def test_the_answers_are_learned_and_so_are_those_to_new_openings(finished, read_lines):
    rows = read_lines(finished.output_dir / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["mean_token_accuracy"] > rows[0]["mean_token_accuracy"]
    heldout = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert heldout[-1] < heldout[0]


def test_held_out_texts_are_read_when_due(finished, read_lines):
    rows = read_lines(finished.output_dir / "metrics.jsonl")
    due = [row for row in rows if "eval/loss" in row]
    assert [row["training/global_step"] for row in due] == [6, 12, 15]
    assert all(row["eval/perplexity"] == pytest.approx(math.exp(row["eval/loss"])) for row in due)


def test_the_held_out_loss_is_that_of_transformers_on_the_completions_alone(
    finished, demonstrations_files, read_lines
):
    theirs = AutoModelForCausalLM.from_pretrained(finished.final_dir)
    tokenizer = load_tokenizer(finished.final_dir)
    total, count = 0.0, 0
    for row in read_lines(Path(demonstrations_files[1])):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            loss = theirs(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
        total, count = total + float(loss) * len(answer), count + len(answer)
    last = read_lines(finished.output_dir / "metrics.jsonl")[-1]
    assert last["eval/loss"] == pytest.approx(total / count, rel=1e-4)


def test_tokens_are_counted_from_the_first_step_on_whatever_step_is_asked_for(sft_config_on_disk, tmp_path):
    config = sft_config_on_disk(tmp_path / "run")
    job, resumed = build_sft_job(config), build_sft_job(config)
    sizes = [int(job.next_batch(step)["tokens"].lengths.sum()) for step in range(4)]
    counted = [job.evaluate(step)["num_tokens"] for step in range(4)]
    assert counted == [sum(sizes[: n + 1]) for n in range(4)]
    assert resumed.evaluate(3)["num_tokens"] == counted[3]
    assert resumed.evaluate(1)["num_tokens"] == counted[1]


def test_a_dry_run_says_how_many_tokens_are_trained(sft_config_on_disk, tmp_path):
    config = sft_config_on_disk(tmp_path / "never")
    rows = dict(check_sft(config))
    assert rows["texts"] == "20 (0 over-long left out, 0 cut)"
    # Completions are two words and the end of sequence.
    assert rows["trained tokens"].startswith("60 of ")
    assert rows["batch"].startswith("8 texts per update, about ")
    assert "24 of them trained" in rows["batch"]
    assert rows["steps"] == "15, 6.00 passes over the texts"
    assert not (tmp_path / "never").exists()


def test_all_tokens_are_trained_when_asked_for(sft_config_on_disk, demonstrations_files, tmp_path):
    data = {"dataset_name": demonstrations_files[0], "loss_on": "all"}
    words = dict(check_sft(sft_config_on_disk(tmp_path / "never", data=data)))["trained tokens"].split()
    assert int(words[0]) == int(words[2]) - 20, "all but the first of each of 20 texts"


def test_a_text_beyond_the_models_positions_is_refused(sft_config_on_disk, write_jsonl, tmp_path):
    rows = [{"prompt": "the film was", "completion": " good" * n} for n in (1, 70)]
    data = {"dataset_name": write_jsonl(tmp_path / "train.jsonl", rows)}
    for start in (check_sft, build_sft_job):
        with pytest.raises(ConfigError, match=r"jsonl:2 has 74 tokens.* takes 64; set `data.max_length`"):
            start(sft_config_on_disk(tmp_path / "run", data=data))
    job = build_sft_job(sft_config_on_disk(tmp_path / "run", data=data | {"max_length": 64}))
    assert "1 texts over data.max_length were left out, the first at" in job.messages[0]
    job = build_sft_job(sft_config_on_disk(tmp_path / "run", data=data | {"max_length": 64, "truncate": True}))
    assert "1 texts were cut at data.max_length, the first at" in job.messages[0]


def test_texts_of_which_nothing_can_be_trained_are_refused(sft_config_on_disk, write_jsonl, tmp_path, monkeypatch):
    from meshift.data.demonstrations import Demonstration, DemonstrationData

    text = Demonstration(tokens=[2, 3], loss_mask=[True, False], where="x.jsonl:1", truncated=True)
    empty = DemonstrationData(demonstrations=[text], overlong=[])
    monkeypatch.setattr("meshift.runtime.sft_run.load_demonstrations", lambda *args, **kwargs: empty)
    with pytest.raises(DataError, match=r"x\.jsonl:1: in this text and all others there is no token to train on"):
        check_sft(sft_config_on_disk(tmp_path / "run"))


def test_the_same_seed_repeats_a_fine_tuning(sft_config_on_disk, tmp_path):
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        result = run_sft(sft_config_on_disk(tmp_path / name, max_steps=2, seed=seed), SilentObserver())
        weights.append((result.final_dir / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_rows_labelled_false_are_left_out_and_reported(sft_config_on_disk, write_jsonl, tmp_path):
    liked = {"prompt": "the film was", "completion": " good", "label": True}
    data = {"dataset_name": write_jsonl(tmp_path / "train.jsonl", [liked, liked | {"label": False}])}
    config = sft_config_on_disk(tmp_path / "run", data=data)
    assert dict(check_sft(config))["texts"] == "1 (0 over-long and 1 labelled false left out, 0 cut)"
    (message,) = build_sft_job(config).messages
    assert message.startswith("1 texts labelled false were left out, the first at ")
    assert message.endswith("train.jsonl:2")
