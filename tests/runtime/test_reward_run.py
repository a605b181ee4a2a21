"""`meshift reward` on a tiny model: it learns a preference that can be learned, and what it saves is usable."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.data.preferences import Pair
from meshift.errors import ConfigError
from meshift.models.hf.load import load_model, load_tokenizer
from meshift.runtime.observer import SilentObserver
from meshift.runtime.reward_run import build_reward_job, check_reward, heldout_metrics, run_reward
from meshift.runtime.role import LocalRole
from meshift.training.readings import SequenceScores

NAMES = (
    "loss",
    "accuracy",
    "margin",
    "grad_norm",
    "lr",
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
)


@pytest.fixture(scope="module")
def finished(reward_config_on_disk, tmp_path_factory):
    config = reward_config_on_disk(tmp_path_factory.mktemp("runs") / "one", eval_steps=10)
    return run_reward(config, SilentObserver())


def test_a_separable_preference_is_learned_and_holds_for_new_texts(finished, read_lines):
    rows = read_lines(finished.output_dir / "metrics.jsonl")
    assert rows[-1]["accuracy"] >= 0.9
    assert rows[-1]["eval/accuracy"] >= 0.9
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["margin"] == pytest.approx(rows[-1]["rewards/chosen"] - rows[-1]["rewards/rejected"], abs=1e-4)


def test_every_step_logs_its_metrics_and_held_out_pairs_are_scored_when_due(finished, read_lines):
    rows = read_lines(finished.output_dir / "metrics.jsonl")
    assert all(set(NAMES) <= set(row) for row in rows)
    assert [row["training/global_step"] for row in rows if "eval/accuracy" in row] == [10, 20, 25]
    for row in rows:  # 15 pairs a step, each of 4 to 14 tokens and two ends
        num_tokens = row["perf/tokens_per_s"] * row["perf/time_per_step"]
        assert num_tokens == pytest.approx(round(num_tokens))
        assert 15 * 4 <= num_tokens <= 15 * 2 * 12


def test_the_saved_model_scores_alike_in_transformers(finished):
    theirs = AutoModelForSequenceClassification.from_pretrained(finished.final_dir, num_labels=1)
    tokenizer = load_tokenizer(finished.final_dir)
    role = LocalRole("reward", load_model(finished.final_dir, head="reward"), TrainableConfig())
    texts = [tokenizer(text)["input_ids"] for text in ("the film was good", "a story", "it was bad and dull .")]
    ours = role.infer(SequenceScores(), Batch({"tokens": Ragged.from_rows(texts)})).batch["scores"].values
    with torch.no_grad():
        logits = [theirs(input_ids=torch.tensor([t]))["logits"].reshape(()) for t in texts]
    torch.testing.assert_close(ours, torch.stack(logits), atol=1e-5, rtol=0)


def test_the_same_seed_repeats_the_run_and_another_does_not(reward_config_on_disk, tmp_path, read_lines):
    results = {}
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        result = run_reward(reward_config_on_disk(tmp_path / name, max_steps=2, seed=seed), SilentObserver())
        losses = [row["loss"] for row in read_lines(result.output_dir / "metrics.jsonl")]
        results[name] = (losses, (result.final_dir / "model.safetensors").read_bytes())
    assert results["one"] == results["two"]
    assert results["one"][0] != results["three"][0]


def test_a_dry_run_shows_the_batch_arithmetic(reward_config_on_disk, tmp_path):
    rows = dict(check_reward(reward_config_on_disk(tmp_path / "never")))
    assert rows["batch"] == "15 pairs = 30 texts per update"
    assert rows["pairs"].startswith("45 (0 over-long and 0 identical")
    assert rows["held-out pairs"] == "15 (0 over-long and 0 identical left out)"
    assert rows["steps"] == "25, 8.33 passes over the pairs"
    assert not (tmp_path / "never").exists()


def test_a_tie_is_half_right(make_folder):
    """A model that scores every text alike guesses."""
    model = load_model(make_folder("reward"), head="reward")
    torch.nn.init.zeros_(model.head.weight)
    role = LocalRole("reward", model, TrainableConfig())
    pairs = [Pair(chosen=[2, 3], rejected=[4], num_prompt_tokens=0, where="") for _ in range(3)]
    assert heldout_metrics(role, pairs) == {"eval/accuracy": 0.5, "eval/margin": 0.0}


def test_a_text_beyond_the_models_positions_is_refused_and_not_left_out(
    reward_config_on_disk, write_jsonl, tmp_path
):
    short = {"prompt": "the film was", "chosen": " good", "rejected": " bad"}
    long = {"prompt": "the film was", "chosen": " good" * 70, "rejected": " bad"}
    for train, heldout in (([short, long], [short]), ([short], [short, long])):
        data = {
            "dataset_name": write_jsonl(tmp_path / "train.jsonl", train),
            "eval_dataset_name": write_jsonl(tmp_path / "heldout.jsonl", heldout),
        }
        for start in (check_reward, build_reward_job):
            with pytest.raises(
                ConfigError, match=r"jsonl:2 has a text of 74 tokens.* takes 64; set `data.max_length`"
            ):
                start(reward_config_on_disk(tmp_path / "run", data=data))
        rows = dict(check_reward(reward_config_on_disk(tmp_path / "run", data=data | {"max_length": 64})))
        assert "1 (1 over-long and 0 identical left out)" in (rows["pairs"], rows["held-out pairs"])


def test_held_out_pairs_that_were_left_out_are_reported(reward_config_on_disk, write_jsonl, tmp_path):
    good = {"prompt": "the film was", "chosen": " good", "rejected": " bad"}
    heldout = [good, good | {"chosen": " bad"}, good | {"chosen": " good" * 9}]
    data = {
        "dataset_name": write_jsonl(tmp_path / "train.jsonl", [good]),
        "eval_dataset_name": write_jsonl(tmp_path / "heldout.jsonl", heldout),
        "max_length": 8,
    }
    config = reward_config_on_disk(tmp_path / "run", data=data)
    overlong, identical = build_reward_job(config).messages
    assert overlong.startswith("1 held-out pairs over data.max_length were left out")
    assert overlong.endswith("heldout.jsonl:3")
    assert identical.endswith("heldout.jsonl:2")
    assert dict(check_reward(config))["held-out pairs"] == "1 (1 over-long and 1 identical left out)"


def test_a_step_gets_its_rows_whatever_was_asked_for_before(reward_config_on_disk, tmp_path):
    config = reward_config_on_disk(tmp_path / "run")
    begun, resumed = build_reward_job(config), build_reward_job(config)
    batches = [begun.next_batch(step) for step in range(4)]
    again = resumed.next_batch(3)
    assert again["chosen"].values.tolist() == batches[3]["chosen"].values.tolist()
    assert again["chosen"].values.tolist() != batches[0]["chosen"].values.tolist()


def test_more_frozen_layers_than_there_are_is_found_by_the_dry_run(reward_config_on_disk, actor_folder, tmp_path):
    model = {"model_name_or_path": str(actor_folder), "num_frozen_layers": 3}
    with pytest.raises(ConfigError, match=r"`model\.num_frozen_layers` = 3, but .* has 2 layers"):
        check_reward(reward_config_on_disk(tmp_path / "run", model=model))


def test_the_configs_weights_margins_and_centring_reach_the_loss(
    reward_config_on_disk, write_jsonl, tmp_path, read_lines
):
    """Each changes the first loss; a margin of zero and equal weights do not."""
    plain = {"prompt": "the film was", "chosen": " good", "rejected": " bad"}
    others = [{"prompt": "a story", "chosen": " great", "rejected": end} for end in (" dull", " bad", " it")]

    def first_loss(name, first, **sections):
        data = {"dataset_name": write_jsonl(tmp_path / f"{name}.jsonl", [first, *others]), "batch_size": 4}
        data |= sections.pop("data", {})
        config = reward_config_on_disk(tmp_path / name, max_steps=1, data=data, **sections)
        return read_lines(run_reward(config, SilentObserver()).output_dir / "metrics.jsonl")[0]["loss"]

    loss = first_loss("plain", plain)
    assert first_loss("zero", plain | {"margin": 0.0, "weight": 1.0}) == loss
    assert first_loss("margin", plain | {"margin": 3.0}) > loss + 0.1
    assert first_loss("weight", plain | {"weight": 5.0}) != pytest.approx(loss, abs=1e-4)
    assert first_loss("prompts", plain, data={"weight_by_prompt": True}) != pytest.approx(loss, abs=1e-4)
    assert first_loss("centred", plain, reward={"center_rewards_coefficient": 0.5}) > loss


def test_a_dry_run_says_that_prompts_are_weighted(reward_config_on_disk, pairs_files, tmp_path):
    data = {"dataset_name": pairs_files[0], "weight_by_prompt": True}
    rows = dict(check_reward(reward_config_on_disk(tmp_path / "never", data=data)))
    assert rows["weights"] == "5 prompts, each counts as one (9.00 pairs each)"
