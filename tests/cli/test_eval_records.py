"""What `meshift eval` says of its completions: who drew them and how, what was broken off, why none is right."""

import os
import shutil
import signal

from evaluations import drawn, results

from meshift.evaluation import marking
from meshift.evaluation.drawn_folder import DrawnFolder


def test_sigterm_would_end_an_evaluation_without_a_word(evaluate, tiny_model, tmp_path, monkeypatch):
    before, add = signal.getsignal(signal.SIGTERM), DrawnFolder.add

    def terminated(folder, saved):
        add(folder, saved)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DrawnFolder, "add", terminated)
    words = drawn(tiny_model, "--num-samples", 2, "--temperature", 2, "--max-new-tokens", 40)
    code, _, said = evaluate(*words)
    assert code == 143
    assert "terminated by SIGTERM; eval-gsm8k keeps the completions that were finished, and the same" in said
    assert (tmp_path / "eval-gsm8k/completions.jsonl").read_text()
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(DrawnFolder, "add", add)
    assert evaluate(*words)[0] == 0
    monkeypatch.setattr(marking, "final_number", lambda text: os.kill(os.getpid(), signal.SIGTERM))
    words = ["--task", "gsm8k", "--data", "gsm8k.jsonl", "--completions", "eval-gsm8k/completions.jsonl"]
    code, _, said = evaluate(*words)
    assert (code, said.splitlines()[-1]) == (143, "meshift: terminated by SIGTERM; nothing was written")


def test_kl_is_of_the_model_that_drew_the_file(evaluate, tiny_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = next(other.glob("*.safetensors"))
    assert evaluate(*drawn(tiny_model, "--temperature", 0.5, "--limit", 1))[0] == 0
    again = [
        "--task",
        "gsm8k",
        "--data",
        "gsm8k.jsonl",
        "--limit",
        1,
        "--output",
        "again",
        "--reference",
        tiny_model,
    ]
    again += ["--completions", "eval-gsm8k/completions.jsonl"]
    assert evaluate(*again, "--model", tiny_model, "--temperature", 0.5)[0] == 0
    assert results("again")["metrics"]["KL to reference"]["value"] == 0.0
    code, _, said = evaluate(*again, "--model", tiny_model, "--temperature", 1)
    assert (code, "was drawn with temperature 0.5, and --temperature is 1.0; leave it out" in said) == (2, True), (
        said
    )
    assert evaluate(*again, "--model", tiny_model)[0] == 0, "the file's own temperature is taken over"
    assert results("again")["settings"]["temperature"] == 0.5
    assert results("again")["metrics"]["KL to reference"]["value"] == 0.0
    weights.touch()
    code, _, said = evaluate(*again, "--model", other, "--temperature", 0.5)
    assert (code, f"was drawn by '{tiny_model}', and --model is '{other}'" in said) == (2, True), said
    shutil.copy("eval-gsm8k/completions.jsonl", "mine.jsonl")  # of a file elsewhere nobody knows who drew it
    assert evaluate(*again, "--completions", "mine.jsonl", "--model", other, "--temperature", 0.5)[0] == 0


def test_a_file_would_be_labelled_as_any_models_and_forget_how_it_was_drawn(evaluate, tiny_model, tmp_path):
    options = ["--temperature", 0.5, "--top-k", 3, "--seed", 4, "--chat"]
    assert evaluate(*drawn(tiny_model, *options))[0] == 0
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    next(other.glob("*.safetensors")).touch()
    again = ["--task", "gsm8k", "--data", "gsm8k.jsonl", "--completions", "eval-gsm8k/completions.jsonl"]
    assert evaluate(*again)[0] == 0
    found = results("eval-gsm8k-scored")
    assert (found["model"], found["model_is_verified"]) == (str(tiny_model), True)
    known = {"temperature": 0.5, "top_k": 3, "top_p": 1.0, "seed": 4, "chat": True, "max_new_tokens": 6}
    assert {name: found["settings"][name] for name in known} == known
    code, _, said = evaluate(*again, "--model", other)
    assert (code, f"was drawn by '{tiny_model}', and --model is '{other}'" in said) == (2, True), said
    code, _, said = evaluate(*again, "--max-new-tokens", 7)
    assert (code, "drawn with max_new_tokens 6, and --max-new-tokens is 7" in said) == (2, True), said
    shutil.copy("eval-gsm8k/completions.jsonl", "mine.jsonl")
    code, _, said = evaluate(*again, "--completions", "mine.jsonl", "--model", other)
    assert code == 0, said
    assert f"that {other} wrote mine.jsonl is what --model says" in said
    found = results("eval-gsm8k-scored")
    assert (found["model"], found["model_is_verified"]) == (str(other), False)
    assert found["settings"]["temperature"] is None, "nobody knows"
    assert "(unverified)" in (tmp_path / "eval-gsm8k-scored/report.html").read_text()
    (tmp_path / "eval-gsm8k/drawing.json").write_text('{"temperature": "hot"}')
    code, _, said = evaluate(*again)
    assert (code, "has temperature 'hot'" in said) == (2, True), said


def test_a_chat_model_would_silently_score_zero_where_it_is_not_asked_as_one(evaluate, tiny_model, tmp_path):
    code, _, said = evaluate(*drawn(tiny_model))
    assert code == 0, said
    first, *_, last = [line for line in said.splitlines() if line.startswith("note: ")]
    assert "has a chat template" in first
    assert "--chat uses it" in first
    assert said.index("chat template") < said.index("completions: 4/4"), "before hours of drawing"
    assert "no completion of 4 is right: " in last
    assert "no answer marker (#### or \\boxed{}; the last number counts) in 4 of 4" in last
    assert [f"note: {note}" for note in results()["notes"]] == [first, last]
    page = (tmp_path / "eval-gsm8k/report.html").read_text()
    assert "--chat uses it" in page
    assert "no completion of 4 is right" in page
    _, _, said = evaluate(*drawn(tiny_model, "--chat", "--output", "asked"))
    assert "chat template" not in said
