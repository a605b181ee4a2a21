"""Win rates, safety rates and agreement with people, against counts by hand; judges asked in both orders."""

import pytest
from benchmark_rows import HH, SAFE_RLHF, questions_of
from chat_server import chat_servers

from meshift.config.reward_kwargs import ChatEndpointConfig
from meshift.errors import DataError, RewardError
from meshift.evaluation.comparing import QUESTION, Pairs, duels, read_verdict
from meshift.evaluation.dialogues import (
    check_dialogues,
    cost_estimates,
    judge_estimates,
    opponents,
    reward_estimates,
    scores_of_all,
)
from meshift.evaluation.saved import Saved
from meshift.rewards.chat_endpoint import UnreadableError


class Lengths:
    """A model whose score of a response is its number of characters less 20."""

    def scores(self, questions, said, truncated):
        assert len(questions) == len(said) == len(truncated)
        return [len(one) - 20.0 for one in said]


def completed(question, *texts):
    return [Saved(id=question.id, sample=j, completion=text) for j, text in enumerate(texts)]


@pytest.fixture
def two(tmp_path):
    """Two questions whose liked responses have 20 and 9 characters, and two completions of each."""
    swapped = {"chosen": HH["rejected"], "rejected": HH["chosen"]}
    questions = questions_of(tmp_path, "hh-rlhf", HH, swapped)
    assert [len(q.liked) for q in questions] == [20, 9]
    saved = [completed(questions[0], "x" * 30, "x" * 20), completed(questions[1], "x" * 5, "x" * 8)]
    return questions, saved


def test_win_rate_and_reward_are_means_over_questions_of_means_over_samples(two):
    questions, saved = two
    scores = scores_of_all(Lengths(), questions, saved)
    assert scores == [[10.0, 0.0], [-15.0, -12.0]]
    found = reward_estimates(Lengths(), questions, scores, opponents(questions, None))
    values = {name: one.value for name, one in found.items()}
    assert values == pytest.approx(
        {
            "reward": (5.0 - 13.5) / 2,
            "reward of chosen": (0.0 - 11.0) / 2,
            "win rate by reward, chosen": ((1.0 + 0.5) / 2 + 0.0) / 2,  # a tie is half a win
            "reward model agrees with people": 0.5,  # the longer one is liked in the first pair alone
        }
    )
    assert found["reward"].num == 2


def test_another_models_completions_stand_in_for_what_people_liked(two):
    questions, saved = two
    against = [completed(questions[0], "x" * 25, "ignored"), completed(questions[1], "x")]
    rivals = opponents(questions, against)
    found = reward_estimates(Lengths(), questions, scores_of_all(Lengths(), questions, saved), rivals)
    assert found["win rate by reward, against"].value == pytest.approx((0.5 + 1.0) / 2)


def test_the_safety_rate_is_the_part_whose_cost_is_at_most_zero(tmp_path):
    questions = questions_of(tmp_path, "safe-rlhf", SAFE_RLHF)
    saved = [completed(questions[0], "x" * 20, "x" * 21, "x", "x" * 40)]
    rivals = opponents(questions, None)
    assert len(rivals.said[0]) == 23
    found = cost_estimates(Lengths(), questions, scores_of_all(Lengths(), questions, saved), rivals)
    assert found["cost of chosen"].value == 3.0
    assert found["win rate by cost, chosen"].value == 0.75, "the lower cost is the better one"
    assert found["safety rate"].value == 0.5
    assert found["cost"].value == pytest.approx((0 + 1 - 19 + 20) / 4)
    # The riskier response of the row is the longer one, which costs more.
    assert found["cost model agrees with people"].value == 1.0


def test_without_anything_to_compare_with_a_judge_is_refused(tmp_path):
    questions = questions_of(tmp_path, "hh-rlhf", {"prompt": "\n\nHuman: Hi\n\nAssistant:"})
    assert opponents(questions, None) is None
    with pytest.raises(DataError, match="--against"):
        check_dialogues(questions, None, judged=True)


@pytest.fixture
def serve(monkeypatch):
    yield from chat_servers(monkeypatch)


def judged(server, ours, theirs, seen=None):
    config = ChatEndpointConfig(url=server.url, model="m", num_tries=1)
    pairs = Pairs(prompts=[f"p{i}" for i in range(len(ours))], ours=ours, theirs=theirs)
    return duels(config, pairs, QUESTION, None if seen is None else lambda *count: seen.append(count))


def answers(question):
    text = question["messages"][0]["content"]
    first = text.split("[Answer A]\n")[1].split("\n[Answer B]")[0]
    second = text.split("[Answer B]\n")[1].split("\n[End]")[0]
    return first, second


def test_a_judge_that_looks_at_the_place_alone_gives_every_pair_half(serve):
    server = serve(lambda question: "Reasons.\nVerdict: A")
    seen = []
    found = judged(server, ["a", "b", "c"], ["d", "e", "f"], seen)
    assert len(server.asked) == 6
    assert [duel.score for duel in found] == [0.5, 0.5, 0.5]
    metrics = judge_estimates(found, "chosen")
    assert metrics["win rate by judge, chosen"].value == 0.5
    assert metrics["judge agrees with itself"].value == 0.0
    assert metrics["judge prefers the first place"].value == 1.0
    assert sorted(seen) == [("judge's answers", i + 1, 6, 0) for i in range(6)]


def test_a_judge_that_looks_at_the_answers_is_the_same_in_both_orders(serve):
    def longer(question):
        first, second = answers(question)
        return f"Verdict: {'tie' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'}"

    found = judged(serve(longer), ["aa", "b", "cc"], ["a", "bb", "dd"])
    assert [duel.score for duel in found] == [1.0, 0.0, 0.5]
    metrics = judge_estimates(found, "chosen")
    assert metrics["win rate by judge, chosen"].value == 0.5
    assert metrics["judge agrees with itself"].value == 1.0
    assert metrics["judge prefers the first place"].value == 0.5


def test_pairs_without_a_verdict_in_both_orders_are_left_out_and_none_at_all_is_an_error(serve, caplog):
    def first_pair_only(question):
        return (
            "Verdict: B" if "bad" in answers(question)[0] else "Verdict: A" if "fine" in str(question) else "Hm."
        )

    found = judged(serve(first_pair_only), ["fine", "x"], ["bad", "y"])
    assert [duel.score for duel in found] == [1.0, None]
    assert "no line 'Verdict: A'" in found[1].wrong
    metrics = judge_estimates(found, "chosen")
    assert metrics["pairs judged"].value == 0.5
    assert "1 of 2 pairs have no verdict: the judge got no line 'Verdict: A'" in caplog.text
    assert (metrics["win rate by judge, chosen"].value, metrics["win rate by judge, chosen"].num) == (1.0, 1)
    with pytest.raises(RewardError, match="no verdict on any of 1 pairs"):
        judge_estimates(found[1:], "chosen")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Verdict: A", 1.0),
        ("**Verdict:** B", 0.0),
        ("verdict: [[tie]]", 0.5),
        ("Verdict: A at first, but\nVerdict: B", 0.0),
        ("Verdict: `A`", 1.0),
        ("Verdict: a", 1.0),
        ("Verdict: A\nOr so it seems.", 1.0),
        ("Verdict: b.", 0.0),
        ("Verdict: a tie", 0.5),
        ("Verdict: A tie.", 0.5),
        ("### Final verdict: **B**", 0.0),
        ("**Final Verdict**: tie", 0.5),
        ("__Verdict__: A is better", 1.0),
        ("My verdict (A, B or tie): B", 0.0),
        ("Verdict: B\nIn my verdict a longer answer lost.", 0.0),
        ("Verdict: B\nVerdict: a longer answer loses.", 0.0),
        ("The verdict: a hard one.\nVerdict: B", 0.0),
    ],
)
def test_verdicts_are_read_as_models_write_them(answer, score):
    assert read_verdict(answer) == score


def test_a_text_without_a_verdict_is_none():
    for answer in (
        "A",
        "Verdict: all good",
        "The verdict is out",
        "Verdict a",
        "Verdict: A or B",
        "My verdict on A: B",
    ):
        with pytest.raises(UnreadableError):
            read_verdict(answer)
