"""An evaluation's page: numbers where they belong on the axis, texts as texts, what was asked for."""

import re
from html.parser import HTMLParser

import pytest

from meshift.report.evaluation_page import LEFT, MAX_SHOWN, WIDTH, Answer, evaluation_page

HOSTILE = "<script>alert(77)</script>\"'>]]> \u202e"


class Checked(HTMLParser):
    """Refuses tags that do not match; collects elements and the text."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "line", "rect"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high, "num": 10}


def page(metrics, answers, notes=(), *, model_is_verified=True, **settings):
    results = {"task": "humaneval", "data": "d.jsonl", "model": "m", "metrics": metrics, "seconds": 2.0}
    counts = {"num_questions": 10, "num_completions": len(answers)}
    counts |= {"notes": notes, "model_is_verified": model_is_verified}
    checked = Checked()
    checked.feed(evaluation_page({**results, **counts, "settings": settings}, answers))
    assert not checked.open
    return checked


def answers(count, **found):
    return [
        Answer(asked="?", said=f"said {i}", truncated=False, found={"id": str(i), "sample": 0, **found})
        for i in range(count)
    ]


def test_parts_of_one_are_drawn_to_scale_and_other_numbers_are_not():
    metrics = {"pass@1": estimate(0.5, 0.25, 0.75), "tokens": estimate(145.0, 115.0, 175.0)}
    found = page(metrics, [])
    spans = [(float(e["x"]), float(e["width"])) for tag, e in found.elements if tag == "rect"]
    scale = WIDTH - LEFT - 24
    assert spans[0] == pytest.approx((LEFT + 0.25 * scale, 0.5 * scale), abs=0.01)
    assert spans[1][0] + spans[1][1] / 2 == pytest.approx(LEFT + 0.5 * scale, abs=0.01)
    assert len(spans) == 2
    for number in ("0.25", "0.75", "145", "115", "175"):
        assert number in found.text


def test_an_interval_of_two_questions_would_be_drawn_over_most_of_the_axis():
    metrics = {"accuracy": estimate(0.5, 0.09, 0.91) | {"num": 2}, "tokens": estimate(4.0) | {"num": 1}}
    found = page(metrics, [])
    assert len([tag for tag, _ in found.elements if tag == "rect"]) == 1, "the value alone"
    assert "0.09" not in found.text
    assert found.text.count("too few\n") == 2
    assert "of 2 questions: too few for an interval" in found.text


def test_a_long_name_of_a_number_would_run_into_the_drawing():
    name = "accuracy (" + "a group whose name is long " * 4 + ")"
    found = page({name: estimate(0.5, 0.25, 0.75)}, [])
    assert f"{name[:45]}\N{HORIZONTAL ELLIPSIS}\n" in found.text
    assert found.text.count(name) == 4, "in the titles of name, line and value, and in the table"


def test_notes_and_a_model_that_nobody_knows_to_have_written_it_stand_at_the_top():
    found = page({}, answers(1), notes=["nothing is right"], model_is_verified=False)
    assert "humaneval: m (unverified)\n" in found.text
    assert found.text.index("nothing is right") < found.text.index("Numbers")
    assert "unverified" not in page({}, answers(1), model_is_verified=True).text


def test_wrong_and_right_answers_stand_apart_and_are_some_of_all():
    found = page({}, [*answers(50, right=False, wrong="test 0: no"), *answers(3, right=True)])
    assert f"Wrong ({MAX_SHOWN} of 50)" in found.text
    assert "Right (3)" in found.text
    assert "not right" in found.text
    assert "test 0: no" in found.text
    assert "said 49" in found.text, "the last one is among those shown"
    unmarked = page({}, answers(2, reward=1.25))
    assert "Wrong" not in unmarked.text
    assert "reward 1.25" in unmarked.text


def test_texts_of_models_and_data_stay_texts():
    hostile = Answer(
        asked=HOSTILE, said=HOSTILE, truncated=True, found={"id": HOSTILE, "sample": 0, "wrong": HOSTILE}
    )
    found = page({HOSTILE: estimate(0.5)}, [hostile], data_name=HOSTILE)
    assert sum(tag == "script" for tag, _ in found.elements) == 1, "the page's own"
    assert found.text.count("alert(77)") >= 5
    assert "length limit" in found.text
    assert re.search(r"data_name\s", found.text)
