"""Answers that take a checker of mathematics too long cost themselves alone."""

from dataclasses import replace

from benchmark_rows import MATH, questions_of

from meshift.config.sections import RewardFunctionConfig
from meshift.evaluation import marking
from meshift.evaluation.saved import Saved
from meshift.evaluation.tasks import find_task
from meshift.rewards.configured import load_functions

FILE = """import time


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if "hang" in solution_str:
        time.sleep(600)
    if "odd" in solution_str:
        raise KeyError("odd")
    return float(solution_str == "right")
"""


def test_more_hanging_answers_than_a_step_waits_for_would_make_all_later_ones_wrong(tmp_path, monkeypatch):
    (tmp_path / "checker.py").write_text(FILE)
    config = RewardFunctionConfig(function=f"{tmp_path}/checker.py:compute_score", on_error="skip", timeout_s=0.2)
    [function] = load_functions([config])
    monkeypatch.setattr(marking, "maths_function", lambda: replace(function, plain="plain"))
    texts = ["right", *["hang"] * 6, "wrong", "odd", "right", "hang", "right"]
    questions = questions_of(tmp_path, "math", MATH)
    saved = [[Saved(id="0", sample=j, completion=text) for j, text in enumerate(texts)]]
    [marks] = marking.mark_answers(find_task("math"), questions, saved)
    assert marks.right == [text == "right" for text in texts]
    assert ["timeout_s = 0.2" in wrong for wrong in marks.wrong] == [text == "hang" for text in texts]
    assert "KeyError" in marks.wrong[texts.index("odd")]
