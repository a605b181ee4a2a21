"""docs/coming_from_*.md: what they show runs as it is shown, and their tables are true of our side."""

import importlib.util
import json

import pytest
from migration_pages import Page, plain, value_at
from pydantic import TypeAdapter

from meshift.cli.main import main
from meshift.config.loading import describe_keys
from meshift.config.policy_runs import DAPORunConfig, GRPORunConfig
from meshift.config.runs import DPORunConfig, PPORunConfig, RewardRunConfig, SFTRunConfig

SCHEMAS = (SFTRunConfig, RewardRunConfig, DPORunConfig, PPORunConfig, GRPORunConfig, DAPORunConfig)
PAGES = ("trl", "verl", "openrlhf")
ARITHMETIC = {"steps_per_generation", "per_device_train_batch_size", "reward_weights", "num_mini_batches"}
ARITHMETIC |= {"actor_rollout_ref.actor.ppo_mini_batch_size", "--train.batch_size", "--data.max_len"}
ARITHMETIC |= {
    "data.train_files",
    "--reward.remote_url",
    "algorithm.use_kl_in_reward",
    "--data.apply_chat_template",
}


@pytest.fixture
def run_page(tiny_model, tmp_path, monkeypatch):
    """Runs a page's commands in a folder with the page's files, on the tiny model; returns the run folders."""

    def run(name):
        page = Page(name)
        page.write_files(tmp_path)
        monkeypatch.chdir(tmp_path)
        folders = []
        for words, config in zip(page.commands(), page.configs(), strict=True):
            models = [f"{r}.model_name_or_path={tiny_model}" for r in ("actor", "critic") if r in config]
            assert main([*words, *models, "max_steps=2", "dtype=float32", "report_to=[]"]) == 0
            folders.append(tmp_path / config["output_dir"])
        return folders

    return run


def samples_of(folder):
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if not row.get("fixed")]


def function_in(path, name):
    spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def asked(folder, prompt):
    """The row of the page's data that a prompt was made from."""
    path = next(p for p in folder.glob("*.jsonl") if p.name != "pairs.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return next(row for row in rows if row["prompt"][0]["content"] in prompt)


def test_the_script_of_a_trl_user_would_not_run_or_would_be_paid_otherwise(run_page, tmp_path):
    sums, dpo = run_page("trl")
    correct = function_in(tmp_path / "rewards.py", "correct")
    samples = samples_of(sums)
    assert len(samples) == 16
    for sample in samples:
        said = [[{"role": "assistant", "content": sample["completion"]}]]
        right = correct(completions=said, answer=[asked(tmp_path, sample["prompt"])["answer"]])[0]
        assert sample["reward"] == pytest.approx(right - 0.5 * len(sample["completion"]) / 100, abs=1e-5)
    assert (sums / "final" / "model.safetensors").is_file()
    assert (dpo / "final" / "model.safetensors").is_file()


def test_the_function_of_a_verl_user_would_not_run_or_would_be_paid_otherwise(run_page, tmp_path):
    (folder,) = run_page("verl")
    compute_score = function_in(tmp_path / "sums.py", "compute_score")
    samples = samples_of(folder)
    assert len(samples) == 16
    for sample in samples:
        truth = asked(tmp_path, sample["prompt"])["reward_model"]["ground_truth"]
        expected = compute_score("sums", sample["completion"], truth)["score"]
        assert sample["reward"] == pytest.approx(expected, abs=1e-5)
    assert "reward/compute_score/right" in (folder / "metrics.jsonl").read_text()


def test_the_function_of_an_openrlhf_user_would_not_run_or_would_not_be_logged(run_page):
    (folder,) = run_page("openrlhf")
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    for step in steps:
        parts = step["reward/reward_func/scores"] - step["reward/reward_func/length"] / 100
        assert step["reward/mean"] == pytest.approx(parts, abs=1e-5)


@pytest.mark.parametrize("name", PAGES)
def test_a_table_would_name_a_key_or_a_default_that_we_do_not_have(name):
    known: dict[str, set[str]] = {}
    for schema in SCHEMAS:
        for key, default, _ in describe_keys(schema):
            known.setdefault(key, set()).add(default)
    rows = list(Page(name).rows())
    assert len(rows) > 50
    for row in rows:
        words = [key.partition(": ")[0] for key in row.keys]
        assert words or "none" in row.ours or "not yet" in row.ours or row.ours == "column `margin`", row
        assert row.ours.startswith("column") or set(words) <= set(known), row
        if row.default is not None:
            ours = [plain(default) for default in known[words[0]]]
            assert plain(row.default) in ours, (row, ours)


def test_a_table_would_name_a_value_that_the_key_does_not_take():
    pairs = {key for name in PAGES for row in Page(name).rows() for key in row.keys if ": " in key}
    assert pairs
    for pair in pairs:
        key, value = pair.split(": ")
        section, field = key.split(".")
        takers = [s.model_fields[section].annotation.model_fields for s in SCHEMAS if section in s.model_fields]
        (info,) = {fields[field].annotation: fields[field] for fields in takers if field in fields}.values()
        assert TypeAdapter(info.annotation).validate_python(value) == value


@pytest.mark.parametrize("name", PAGES)
def test_a_script_side_by_side_would_set_something_that_ours_sets_otherwise(name):
    page = Page(name)
    rows = [(theirs, row) for row in page.rows() for theirs in row.theirs]
    compared = 0
    for settings, config in zip(page.settings(), page.configs(), strict=True):
        for key, value in settings.items():
            named = [row.keys for theirs, row in rows if theirs == key]
            assert named, f"{key} is set in the script and stands in no table"
            values = [value_at(config, keys[0]) for keys in named if len(keys) == 1 and "[]" not in keys[0]]
            if key in ARITHMETIC or not values:
                continue
            assert plain(value) in [plain(ours) for ours in values], key
            compared += 1
    assert compared >= 15


def test_batches_side_by_side_would_be_of_different_sizes():
    trl, verl, openrlhf = (Page(name) for name in PAGES)
    (grpo, dpo), (sums, pairs) = trl.settings(), trl.configs()
    num_completions = sums["data"]["batch_size"] * sums["generation"]["num_generations"]
    assert grpo["per_device_train_batch_size"] == num_completions
    assert dpo["per_device_train_batch_size"] == pairs["data"]["batch_size"]
    assert grpo["reward_weights"] == [f["weight"] for f in sums["reward"]["functions"]]
    (settings,), (config,) = verl.settings(), verl.configs()
    per_update = int(settings["actor_rollout_ref.actor.ppo_mini_batch_size"])
    assert config["ppo"]["num_mini_batches"] * per_update == config["data"]["batch_size"]
    (settings,), (config,) = openrlhf.settings(), openrlhf.configs()
    num_completions = config["data"]["batch_size"] * config["generation"]["num_generations"]
    assert config["ppo"]["num_mini_batches"] * int(settings["--train.batch_size"]) == num_completions
    longest = config["data"]["max_prompt_length"] + config["generation"]["max_completion_length"]
    assert longest == int(settings["--data.max_len"])
