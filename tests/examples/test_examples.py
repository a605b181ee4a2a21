"""The programs of examples/: each runs as a user would start it, on a tiny model, and does what it says."""

import ast
import hashlib
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

EXAMPLES = Path(__file__).parents[2] / "examples"
MAX_LINES = 30


def code_lines(text):
    """Lines that do something: not blank, neither the module's docstring nor an import."""
    aside = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Expr):
            aside |= set(range(node.lineno, node.end_lineno + 1))
    return [line for i, line in enumerate(text.splitlines(), 1) if line.strip() and i not in aside]


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_an_example_would_be_longer_than_one_reads_at_a_glance():
    assert len(code_lines('"""One."""\nimport os\n\nA = 1\nB = os.path.join(\n    "a",\n)\n')) == 4
    sizes = {path.name: len(code_lines(path.read_text())) for path in EXAMPLES.glob("*.py")}
    assert len(sizes) >= 6
    assert not {name: size for name, size in sizes.items() if size >= MAX_LINES}


def test_every_example_has_a_test_here():
    called = {
        call.args[0].value
        for call in ast.walk(ast.parse(Path(__file__).read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "run_example"
    }
    assert called == {path.stem for path in EXAMPLES.glob("*.py")}


def test_generate_would_not_give_the_same_texts_for_the_same_seed(run_example, tiny_model, capsys):
    texts = run_example("generate", tiny_model)
    assert len(texts) == 6
    assert len(set(texts)) > 1
    assert run_example("generate", tiny_model) == texts
    assert "On Sunday we drove to the|" in capsys.readouterr().out


def test_the_reward_model_would_not_score_as_transformers_reads_it(run_example, tiny_model, tmp_path):
    import torch
    from transformers import AutoTokenizer

    scores = run_example("reward_model", tiny_model, str(tmp_path / "reward"))
    final = tmp_path / "reward" / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(final)
    text = "How do I boil an egg? Eggs, eggs, eggs.<eos>"
    # One row: `transformers` reads the score at the last token that is no padding, and here padding is the end.
    model.config.pad_token_id = None
    expected = model(torch.tensor([tokenizer(text)["input_ids"]])).logits
    assert scores[1] == pytest.approx(expected.item(), abs=1e-4)


def test_ppo_would_not_train_towards_the_function_in_the_file(run_example, tiny_model, tmp_path, capsys):
    result = run_example("ppo_own_reward", tiny_model, str(tmp_path / "ppo"))
    assert "step 3: reward" in capsys.readouterr().out
    assert result.metrics["reward/brevity"] == pytest.approx(result.metrics["reward/mean"], abs=1e-5)
    assert result.metrics["reward/mean"] < 0
    AutoModelForCausalLM.from_pretrained(result.final_dir)


def test_dpo_would_not_start_from_what_sft_wrote(run_example, tiny_model, tmp_path, capsys):
    result = run_example("sft_then_dpo", tiny_model, str(tmp_path))
    assert "SFT: loss" in capsys.readouterr().out
    assert f"model_name_or_path: {tmp_path}/sft/final" in (tmp_path / "dpo" / "config.yaml").read_text()
    assert result.final_dir == tmp_path / "dpo" / "final"
    AutoModelForCausalLM.from_pretrained(result.final_dir)


def test_a_resumed_run_would_differ_from_an_unbroken_one(run_example, tiny_model, tmp_path, capsys):
    from meshift.config.loading import load_config
    from meshift.config.runs import SFTRunConfig
    from meshift.runtime.observer import SilentObserver
    from meshift.runtime.sft_run import run_sft

    resumed = run_example("resume", tiny_model, str(tmp_path / "resumed"))
    assert "checkpoint-2 is the last checkpoint" in capsys.readouterr().out
    unbroken = [f"output_dir={tmp_path / 'unbroken'}"]
    config = load_config(SFTRunConfig, tmp_path / "resumed" / "config.yaml", unbroken)
    expected = run_sft(config.model_copy(update={"overwrite_output_dir": True}), SilentObserver())
    assert digests(resumed.final_dir) == digests(expected.final_dir)


def test_reinforce_would_not_be_three_calls_in_a_chain_or_not_learn(run_example, tiny_model, capsys):
    graph = run_example("reinforce", tiny_model)
    assert [call.name for call in graph.order()] == ["draw", "score", "train"]
    assert graph.edges["train"] == {"draw", "score"}
    lines = capsys.readouterr().out.splitlines()
    norms = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert len(norms) == 3
    assert min(norms) > 0
