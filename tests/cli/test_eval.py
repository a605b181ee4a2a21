"""`meshift eval` from end to end: what it writes, an interruption and its continuation, and what it refuses."""

import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from chat_server import chat_servers
from evaluations import drawn, results, write

from meshift.evaluation.drawn_folder import DrawnFolder


def test_a_model_is_completed_scored_and_reported_on(evaluate, tiny_model, tmp_path):
    code, printed, said = evaluate(*drawn(tiny_model, "--num-samples", 3, "--temperature", 1, "--k", "1,3"))
    assert code == 0, said
    assert "accuracy" in printed
    assert "completions: 12/12  elapsed" in said
    folder = tmp_path / "eval-gsm8k"
    found = results()
    assert (found["num_questions"], found["num_completions"]) == (4, 12)
    assert {"accuracy", "pass@3", "truncated", "tokens"} <= set(found["metrics"])
    assert found["settings"]["temperature"] == 1.0
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [(str(i), j) for i in range(4) for j in range(3)]
    assert all(1 <= len(line["completion_ids"]) <= 6 for line in lines)
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [score["right"] for score in scores] == [False] * 12  # this model has no word for a number
    page = (folder / "report.html").read_text()
    HTMLParser().feed(page)
    assert "12 completions" in page
    assert "the film was good and I liked it" in page


def test_the_same_command_goes_on_where_it_was_interrupted(evaluate, tiny_model, tmp_path, monkeypatch):
    words = drawn(tiny_model, "--num-samples", 2, "--temperature", 2, "--max-new-tokens", 40)
    assert evaluate(*words, "--output", "unbroken")[0] == 0
    add, calls = DrawnFolder.add, []

    def interrupted(folder, saved):
        add(folder, saved)
        calls.append(len(saved))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(DrawnFolder, "add", interrupted)
    code, _, said = evaluate(*words, "--output", "broken")
    assert code == 130
    assert "broken keeps the completions that were finished, and the same command goes on" in said
    assert len((tmp_path / "broken/completions.jsonl").read_text().splitlines()) == sum(calls) < 8
    assert not (tmp_path / "broken/results.json").exists()
    monkeypatch.setattr(DrawnFolder, "add", lambda folder, saved: (calls.append(len(saved)), add(folder, saved)))
    assert evaluate(*words, "--output", "broken")[0] == 0
    assert sum(calls) == 8, "what was finished was drawn again"
    for name in ("completions.jsonl", "scores.jsonl"):
        assert (tmp_path / "broken" / name).read_text() == (tmp_path / "unbroken" / name).read_text()


def test_more_samples_are_drawn_beside_those_that_are_there(evaluate, tiny_model, tmp_path):
    options = ["--temperature", 1, "--output", "grown"]
    assert evaluate(*drawn(tiny_model, *options, "--limit", 2))[0] == 0
    first = (tmp_path / "grown/completions.jsonl").read_text().splitlines()
    assert evaluate(*drawn(tiny_model, *options, "--num-samples", 3))[0] == 0
    grown = (tmp_path / "grown/completions.jsonl").read_text().splitlines()
    assert len(grown) == 12
    assert [grown[0], grown[3]] == first
    assert evaluate(*drawn(tiny_model, "--temperature", 1, "--num-samples", 3, "--output", "whole"))[0] == 0
    assert (tmp_path / "whole/completions.jsonl").read_text().splitlines() == grown
    code, _, said = evaluate(*drawn(tiny_model, "--temperature", 0.5, "--output", "grown"))
    assert code == 2
    assert "drawn with temperature 1.0, and it is 0.5 now" in said


def test_completions_are_scored_again_without_a_model(evaluate, tmp_path):
    right = [f"So it is #### {i}" for i in range(3)]
    write(tmp_path / "mine.jsonl", [{"id": str(i), "completion": text} for i, text in enumerate([*right, "9"])])
    code, _, said = evaluate("--task", "gsm8k", "--data", "gsm8k.jsonl", "--completions", "mine.jsonl")
    assert code == 0, said
    accuracy = results("eval-gsm8k-scored")["metrics"]["accuracy"]
    assert (accuracy["value"], accuracy["num"]) == (0.75, 4)
    # Wilson's interval of 3 out of 4, as tables have it.
    assert (accuracy["low"], accuracy["high"]) == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert not (tmp_path / "eval-gsm8k/completions.jsonl").exists()


def test_dialogues_are_scored_by_a_reward_and_a_cost_model_and_held_to_a_reference(
    evaluate, tiny_model, tiny_reward
):
    words = ["--task", "hh-rlhf", "--data", "hh.jsonl", "--model", tiny_model, "--max-new-tokens", 5]
    words += ["--temperature", 1, "--num-samples", 2, "--reward-model", tiny_reward, "--cost-model", tiny_reward]
    code, _, said = evaluate(*words, "--reference", tiny_model)
    assert code == 0, said
    found = results("eval-hh-rlhf")["metrics"]
    assert found["KL to reference"]["value"] == 0.0
    assert found["reward"] == found["cost"]
    ours, theirs = (found[f"win rate by {name}, chosen"]["value"] for name in ("reward", "cost"))
    assert ours + theirs == pytest.approx(1.0)
    assert 0 <= found["win rate by reward, chosen"]["value"] <= 1
    assert found["win rate by reward, chosen"]["num"] == 3
    with open("eval-hh-rlhf/scores.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert found["safety rate"]["value"] == pytest.approx(sum(row["cost"] <= 0 for row in rows) / 6)
    assert found["reward"]["value"] == pytest.approx(sum(row["reward"] for row in rows) / 6)


@pytest.fixture
def serve(monkeypatch):
    yield from chat_servers(monkeypatch)


def test_a_judge_compares_with_another_models_completions_in_both_orders(evaluate, serve, tmp_path, monkeypatch):
    """It likes what says "great"; our first answer does, our second is as good as theirs, our third is worse."""

    def answer(question):
        text = question["messages"][0]["content"]
        first, second = re.search(r"One:(.*)\nTwo:(.*)", text).groups()
        return "Verdict: " + (
            "tie" if ("great" in first) == ("great" in second) else "A" if "great" in first else "B"
        )

    server = serve(answer)
    monkeypatch.setenv("KEY", "secret")
    (tmp_path / "question.txt").write_text("To {prompt} they say\nOne:{first}\nTwo:{second}\nVerdict?")
    for name, texts in (("ours", (" great", " great", " bad")), ("theirs", (" bad", " great", " great"))):
        write(tmp_path / f"{name}.jsonl", [{"id": str(i), "completion": text} for i, text in enumerate(texts)])
    words = ["--task", "hh-rlhf", "--data", "hh.jsonl", "--completions", "ours.jsonl", "--against", "theirs.jsonl"]
    words += ["--judge-url", server.url, "--judge-model", "m", "--judge-key-env", "KEY"]
    code, _, said = evaluate(*words, "--judge-question", "question.txt", "--judge-bare")
    assert code == 0, said
    assert {key for asked in server.asked for key in asked.body} == {"model", "messages"}
    assert "judge's answers: 6/6" in said
    assert {asked.headers["Authorization"] for asked in server.asked} == {"Bearer secret"}
    found = results("eval-hh-rlhf-scored")["metrics"]
    assert found["win rate by judge, against"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["judge agrees with itself"]["value"] == 1.0
    with open("eval-hh-rlhf-scored/scores.jsonl", encoding="utf-8") as file:
        assert [json.loads(line)["judge"] for line in file] == [1.0, 0.5, 0.0]


def test_a_judge_that_fails_would_look_as_if_it_had_answered(evaluate, serve, tmp_path):
    server = serve(lambda question: "I cannot say.")
    mine = write(tmp_path / "mine.jsonl", [{"id": str(i), "completion": " good"} for i in range(3)])
    words = ["--task", "hh-rlhf", "--data", "hh.jsonl", "--completions", mine]
    code, _, said = evaluate(*words, "--judge-url", server.url, "--judge-model", "m")
    assert code == 1, said
    assert "judge's answers: 6/6, 6 failed" in said
    assert "the judge gave no verdict on any of 3 pairs: it got no line 'Verdict: A'" in said


def test_what_scores_is_looked_for_before_anything_is_drawn(
    evaluate, tiny_model, tiny_reward, tmp_path, monkeypatch
):
    """Else hours of completions end in a sentence about a package, a key or another model's tokenizer."""
    monkeypatch.setattr(DrawnFolder, "add", lambda *given: pytest.fail("completions were drawn"))
    words = ["--task", "hh-rlhf", "--data", "hh.jsonl", "--model", tiny_model, "--temperature", 1]
    judge = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "j"]
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "\n\nHuman: it\n\nAssistant:"}])
    another = tmp_path / "another"
    shutil.copytree(tiny_model, another)
    table = json.loads((another / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["the"], vocabulary["film"] = vocabulary["film"], vocabulary["the"]
    (another / "tokenizer.json").write_text(json.dumps(table))
    bare = tmp_path / "bare"
    shutil.copytree(tiny_reward, bare)
    for template in bare.glob("chat_template*"):
        template.unlink()
    turns = write(tmp_path / "turns.jsonl", [{"prompt": [{"role": "user", "content": "it"}]}])
    long = write(tmp_path / "long.jsonl", [{"prompt": f"\n\nHuman: {'it ' * 600}\n\nAssistant:"}])
    for more, sentence in (
        (["--reward-model", tiny_model], "it is no reward model"),
        (
            ["--cost-model", bare, "--chat", "--data", turns, "--model", another],
            f"the cost model {bare} has no chat template, by",
        ),
        (["--reward-model", tiny_reward, "--data", long], "long.jsonl:1: prompt and response have"),
        (["--reference", another], "another tokenizer"),
        ([*judge, "--judge-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY, which is not in the environment"),
        ([*judge, "--judge-url", "ftp://x"], "only http and https"),
        ([*judge, "--data", prompts], "give another model's completions with --against"),
        (["--reward-model", tiny_reward, "--against", "none.jsonl"], "none.jsonl does not exist"),
    ):
        code, _, said = evaluate(*words, *more)
        assert (code, sentence in said) == (2, True), said


def test_a_page_shows_what_models_wrote_as_text(evaluate, tmp_path):
    hostile = "<script>alert(77)</script><img src=x> \ud800"
    lines = [{"id": str(i), "completion": hostile} for i in range(4)]
    write(tmp_path / "mine.jsonl", [*lines[:3], {"id": "3", "completion": "\u202e #### 3"}])
    path = tmp_path / "mine.jsonl"
    path.write_text(path.read_text().replace("\\ud800", ""))
    assert evaluate("--task", "gsm8k", "--data", "gsm8k.jsonl", "--completions", "mine.jsonl")[0] == 0
    page = (tmp_path / "eval-gsm8k-scored/report.html").read_text()
    assert "alert(77)" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert re.search(r"Wrong \(3\)", page)
    assert re.search(r"Right \(1\)", page)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "the following arguments are required: --task"),
        (["--task", "gsm9k"], "gsm8k"),
        (["--task", "gsm8k"], "there is nothing to evaluate; give --model DIR, or --completions FILE"),
        (["--task", "apps", "--model", "m"], "--task apps needs its rows; give --data FILE"),
        (["--task", "gsm8k", "--model", "m", "--num-samples", "2"], "--num-samples needs --temperature above 0"),
        (["--task", "gsm8k", "--model", "m", "--k", "1,x"], "write it as 1,10,100"),
        (["--task", "gsm8k", "--model", "m", "--k", "10", "--data", "gsm8k.jsonl"], "raise --num-samples"),
        (["--task", "math", "--data", "math.jsonl", "--model", "m"], "run `pip install 'meshift[math]'`"),
        (["--task", "gsm8k", "--model", "m", "--n-at-k", "1@1"], "--n-at-k is of programs"),
        (["--task", "humaneval", "--model", "m", "--n-at-k", "9@3"], "write it as 10@1000"),
        (["--task", "gsm8k", "--model", "m", "--limit", "0"], "--limit is 0; set it to 1 or more"),
        (["--task", "hh-rlhf", "--data", "hh.jsonl", "--model", "m"], "hh-rlhf is scored by a model"),
        (["--task", "hh-rlhf", "--data", "hh.jsonl", "--model", "m", "--judge-url", "http://x"], "give both"),
        (["--task", "gsm8k", "--completions", "c", "--reference", "r"], "give --model"),
        (["--task", "gsm8k", "--model", "m", "--reference", "r"], "--reference needs --temperature above 0"),
        (["--task", "gsm8k", "--data", "none.jsonl", "--model", "m"], "none.jsonl does not exist"),
        (["--task", "gsm8k", "--data", "hh.jsonl", "--model", "m"], "hh.jsonl:1"),
        (["--task", "gsm8k", "--data", "gsm8k.jsonl", "--completions", "none.jsonl"], "none.jsonl does not exist"),
        (["--task", "gsm8k", "--data", "gsm8k.jsonl", "--model", "./none"], "there is no model folder ./none"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(evaluate, words, sentence, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else found(name))
    write(tmp_path / "math.jsonl", [{"problem": "1 + 1", "solution": "$\\boxed{2}$"}])
    code, _, said = evaluate(*words)
    assert code == 2, said
    assert sentence in said
    assert said.count("\n") == 1


def test_n_at_k_of_a_file_of_programs(evaluate, tmp_path):
    row = {
        "name": "sum",
        "description": "Add the numbers of a line.",
        "public_tests": {"input": ["1 2"], "output": ["3"]},
        "private_tests": {"input": ["2 5"], "output": ["7"]},
        "generated_tests": {"input": ["4 4", "9 0"], "output": ["8", "9"]},
    }
    data = write(tmp_path / "contests.jsonl", [row])
    right = "print(sum(map(int, input().split())))"
    programs = [right, "print(3)", f"```python\n{right}\n```", "print(input())"]
    mine = write(tmp_path / "mine.jsonl", [{"id": "sum", "completion": text} for text in programs])
    words = ["--task", "codecontests", "--data", data, "--completions", mine, "--k", "1,2", "--n-at-k", "1@4"]
    code, printed, said = evaluate(*words, "--n-at-k", "2@3", "--partial", "--test-timeout", 2)
    assert code == 0, said
    found = {name: one["value"] for name, one in results("eval-codecontests-scored")["metrics"].items()}
    assert found["pass@1"] == 0.5
    assert found["pass@2"] == pytest.approx(5 / 6)
    assert found["1@4 filtered"] == pytest.approx(2 / 3)
    assert found["1@4 clustered"] == 1.0
    assert found["tests passed"] == pytest.approx((4 + 1 + 4 + 0) / 16)
    assert "programs told apart: 3/3" in said  # those that pass the public test
    assert "2@3 clustered" in printed


def test_a_chat_model_is_asked_through_its_template(evaluate, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    assert evaluate(*drawn(tiny_model, "--chat", "--limit", 1))[0] == 0
    line = json.loads((tmp_path / "eval-gsm8k/completions.jsonl").read_text())
    text = AutoTokenizer.from_pretrained(tiny_model).decode(line["prompt_ids"])
    assert text.startswith("user the film was good and I liked it")
    assert text.endswith("assistant")
