"""The recipe with rewards of TRL's, verl's and OpenRLHF's signatures: files that know none of us; a short run."""

import ast
import inspect
import json
from pathlib import Path

import pytest
from tiny_dialogue import save_dialogue_model

from meshift.cli.main import main
from meshift.config.loading import load_config
from meshift.config.policy_runs import GRPORunConfig
from meshift.rewards.configured import check_columns, load_functions
from meshift.rewards.signatures import read_signature

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/grpo_ported_rewards.yaml"
FILES = {name: ROOT / f"recipes/ported_rewards/{name}_reward.py" for name in ("trl", "verl", "openrlhf")}


def test_the_files_are_written_for_other_frameworks_and_import_nothing_of_ours():
    for path in FILES.values():
        imported = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert imported <= {"re", "torch", "typing"}, path


def test_each_function_is_recognised_by_its_parameters_and_gets_what_the_rows_have(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(GRPORunConfig, RECIPE, ["max_steps=3"])
    functions = load_functions(config.reward.functions)
    signatures = [read_signature(one.function) for one in functions]
    assert [one.flavour for one in signatures] == ["TRL", "verl", "OpenRLHF"]
    parameters = [list(inspect.signature(one.function).parameters) for one in functions]
    assert parameters[0][:2] == ["prompts", "completions"]
    assert parameters[1] == ["data_source", "solution_str", "ground_truth", "extra_info"]
    assert parameters[2] == ["queries", "prompts", "labels"]
    rows = [json.loads(line) for line in (ROOT / "examples/sums.jsonl").read_text().splitlines()]
    check_columns(functions, list(rows[0]))


def test_the_rows_sums_are_right():
    for line in (ROOT / "examples/sums.jsonl").read_text().splitlines():
        row = json.loads(line)
        a, b = (
            int(word.strip("?")) for word in row["prompt"][0]["content"].split() if word.strip("?").isdecimal()
        )
        assert row["reward_model"]["ground_truth"] == str(a + b)


def test_three_steps_of_the_recipe_have_all_three_rewards_and_their_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    save_dialogue_model(tmp_path / "model")
    out = tmp_path / "run"
    small = ["max_steps=3", f"output_dir={out}", f"actor.model_name_or_path={tmp_path / 'model'}"]
    small += ["actor.num_frozen_layers=0", "data.batch_size=2", "generation.num_generations=4"]
    small += ["generation.max_completion_length=8"]
    assert main(["grpo", "--config", str(RECIPE), *small]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        parts = [row[f"reward/{name}"] for name in ("format_reward", "compute_score", "reward_func")]
        assert row["reward/mean"] == pytest.approx(0.5 * parts[0] + parts[1] + 0.25 * parts[2], abs=1e-6)
        assert {"reward/compute_score/acc", "reward/reward_func/named", "reward/reward_func/scores"} <= set(row)
        for name in ("format_reward", "compute_score", "reward_func"):
            assert row[f"perf/time_per_reward/{name}"] > 0
