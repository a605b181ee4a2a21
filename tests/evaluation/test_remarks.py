"""Reasons why nothing is right: those that hold of at least half of the completions, and no others."""

from meshift.evaluation.marking import Marks
from meshift.evaluation.remarks import template_remark, zero_remarks
from meshift.evaluation.saved import Saved
from meshift.evaluation.tasks import TASKS


def remark(task, texts, *, right=(), wrong=(), truncated=0, chat=False):
    saved = [[Saved(id=str(i), sample=0, completion=t, truncated=i < truncated)] for i, t in enumerate(texts)]
    marks = [
        Marks(right=[i in right], wrong=[wrong[i]] if wrong else [], of_programs=TASKS[task].kind == "code")
        for i in range(len(texts))
    ]
    found = zero_remarks(TASKS[task], saved, marks, chat=chat)
    assert len(found) == (0 if right else 1)
    return found[0] if found else ""


def test_nothing_is_said_where_one_completion_is_right():
    assert remark("gsm8k", ["", "", "#### 3"], right=[2]) == ""


def test_word_problems_without_a_mark_or_a_number_are_told_apart():
    said = remark("gsm8k", ["it is 3", "four", "#### 3", "five"])
    assert r"no answer marker (#### or \boxed{}; the last number counts) in 3 of 4" in said
    assert "no number in 2 of 4" in said
    assert "empty" not in said
    assert "length limit" not in said
    said = remark("gsm8k", ["#### 3", "\\boxed{3}"])
    assert "no answer marker" not in said
    assert "no number" not in said


def test_completions_that_were_cut_or_are_empty_are_counted():
    said = remark("math", ["", " \n", "a", "b"], truncated=3)
    assert "empty in 2 of 4" in said
    assert "cut at the length limit (--max-new-tokens) in 3 of 4" in said
    assert r"no answer marker (\boxed{}) in 4 of 4" in said


def test_programs_want_a_block_from_a_chat_model_alone_and_name_the_commonest_verdict():
    texts, wrong = ["x", "```python\ny\n```", "z"], ["SyntaxError", "test 0: no", "SyntaxError"]
    said = remark("mbpp", texts, wrong=wrong, chat=True)
    assert "no code block in 2 of 3" in said
    assert "the commonest verdict, of 2: SyntaxError" in said
    assert "code block" not in remark("mbpp", texts, wrong=wrong)


def test_a_template_is_told_of_only_where_it_is_not_used():
    assert template_remark("m", True, chat=True) == template_remark("m", False, chat=False) == []
    assert "m has a chat template" in template_remark("m", True, chat=False)[0]
