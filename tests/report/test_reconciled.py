"""Predictions beside measurements: what is compared, which error is named, and which cause is found for it."""

import pytest

from meshift.report.reconciled import factors, host_seconds, reconcile
from meshift.report.reconciled_table import reconciled_section


def event(name, start, seconds, timed_as=None, parts=None, kind="call"):
    timed = {"timed_as": timed_as or name, "parts_s": parts or {}, "kind": kind}
    return {"name": name, "start_s": start, "end_s": start + seconds, **timed}


def plan_of(*events, by_completion=(), measured=True):
    predicted = {"step_s": 3.0, "events": list(events), "by_completion": list(by_completion)}
    return {"predicted": predicted, "hardware_is_measured": measured, "hardware": {"name": "an abacus"}}


EVENTS = (
    event("rollout", 0, 2.0, parts={"decode": 1.5, "prefill": 0.5}),
    event("train_actor", 2.0, 1.0),
    event("actor to generate", 3.0, 0.1, kind="move"),
)


@pytest.fixture
def run(make_run):
    """`run(plan, **metrics)`: rollout takes 4 s after a slow first step, training the second predicted."""

    def make(plan, **more):
        metrics = {
            "timing_s/rollout": [9.0, 4.0, 4.0, 4.0, 4.0],
            "timing_s/train_actor": [5.0, 1.0, 1.02, 0.98, 1.0],
            "perf/time_per_step": [15.0, 5.0, 5.1, 5.0, 5.0],
        }
        return make_run({**metrics, **more}, plan=plan)

    return make


def test_a_first_step_that_is_slow_would_be_compared(run):
    found = reconcile(run(plan_of(*EVENTS)))
    calls = {one.name: one for one in found.calls}
    assert calls.keys() == {"rollout", "train_actor"}
    assert (calls["rollout"].predicted, calls["rollout"].measured) == (2.0, 4.0)
    assert calls["rollout"].error == pytest.approx(-0.5)
    assert (found.step.predicted, found.step.measured) == (3.0, 5.0)
    assert factors(run(plan_of(*EVENTS))) == {"rollout": 2.0, "train_actor": 1.0}


def test_what_was_timed_and_not_predicted_is_the_hosts(run):
    timed = {"timing_s/reward_functions": [9.0, 2.0, 2.0, 3.0], "timing_s/score": [1.0, 1.0]}
    moved = {"timing_s/actor to generate": [0.1, 0.1]}
    known = (*EVENTS, event("score 2", 2.0, 1.0, timed_as="score"))
    assert host_seconds(run(plan_of(*known), **timed, **moved)) == {"reward_functions": 2.0}


def sentence(found):
    return " ".join(found.sentences)


def test_the_largest_error_is_named_with_the_part_it_lies_in(run):
    said = sentence(reconcile(run(plan_of(*EVENTS))))
    assert (
        "The largest error over 10 %, in seconds, is in rollout: "
        "predicted 2 s, measured 4 s (2 times the prediction)" in said
    )
    assert "(most of it: decode)" in said
    assert "`meshift plan` with `--measured runs/x`" in said


def test_lengths_that_could_not_be_known_explain_an_error(run):
    """Twice as many tokens as expected, for which almost twice the time is predicted."""
    known = [
        {"completion": tokens, "calls_s": {"rollout": tokens / 10, "train_actor": 1.0}} for tokens in (10, 20, 80)
    ]
    given = run(plan_of(*EVENTS, by_completion=known), **{"response_length/mean": [20.0, 38.0, 38.0, 38.0, 38.0]})
    found = reconcile(given)
    assert {one.name: one.drawn for one in found.calls} == pytest.approx({"rollout": 3.8, "train_actor": 1.0})
    assert "Completions had 38 tokens in the mean, which was not known: for that length 3.8 s" in sentence(found)
    assert factors(given)["rollout"] == pytest.approx(4 / 3.8)


def test_guessed_rates_and_other_work_explain_errors(run):
    assert "`meshift profile` measures them" in sentence(reconcile(run(plan_of(*EVENTS, measured=False))))
    uneven = {"timing_s/rollout": [9.0, 3.0, 4.0, 5.0, 6.0]}
    assert "the machine had other work to do" in sentence(reconcile(run(plan_of(*EVENTS), **uneven)))


def test_calls_that_all_took_longer_are_the_machines(run):
    slow = {"timing_s/train_actor": [9.0, 2.0, 2.0, 2.0, 2.0]}
    said = sentence(reconcile(run(plan_of(*EVENTS), **slow)))
    assert "All calls took 2 to 2 times what was predicted: the machine had other work to do" in said


def test_rounds_of_a_loop_are_one_call_and_explain_an_error(run):
    events = (event("rollout", 0, 1.0), event("rollout (round 2)", 1, 1.0, "rollout"), *EVENTS[1:])
    given = run(plan_of(*events), **{"sampling/num_rounds": [4.0] * 5})
    found = reconcile(given)
    assert {one.name: one.predicted for one in found.calls}["rollout"] == 2.0
    assert "4 rounds of drawing were needed, and 2 were expected" in sentence(found)


def test_predictions_that_hold_need_no_cause(run):
    said = sentence(reconcile(run(plan_of(event("rollout", 0, 4.1), event("train_actor", 4.1, 1.0)))))
    assert said == "Every call took what was predicted within 2.5 %."


def test_a_long_call_that_holds_hides_no_shorter_one_that_does_not(run):
    """Of rollout half a second is 5 %; of training 0.4 s are 40 %."""
    memory = {
        "perf/predicted_memory_gb/rollout": [20.0] * 5,
        "perf/peak_memory_gb/rollout": [19.0] * 5,
        "perf/predicted_memory_gb/train_actor": [1.5] * 5,
        "perf/peak_memory_gb/train_actor": [1.0] * 5,
    }
    timed = {"timing_s/rollout": [9.0, *[9.5] * 4], "perf/time_per_step": [15.0, *[10.5] * 4]}
    given = plan_of(event("rollout", 0, 10.0), event("train_actor", 10.0, 1.4))
    said = sentence(reconcile(run(given, **timed, **memory)))
    assert "Every call" not in said
    assert "The largest error over 10 %, in seconds, is in train_actor: predicted 1.4 s, measured 1 s" in said
    assert "Of memory the largest error over 10 % is in train_actor" in said


def test_a_machine_that_was_measured_beside_other_work_explains_an_error(run):
    said = sentence(reconcile(run({**plan_of(*EVENTS), "hardware_was_busy": True})))
    assert "measured while other work ran on it" in said


def test_memory_is_compared_by_its_peak(run):
    memory = {
        "perf/predicted_memory_gb/rollout": [2.0] * 5,
        "perf/peak_memory_gb/rollout": [1.0, 1.2, 1.6, 1.6, 1.6],
        "perf/predicted_memory_gb/train_actor": [3.0] * 5,
        "perf/peak_memory_gb/train_actor": [3.0] * 5,
    }
    found = reconcile(run(plan_of(*EVENTS), **memory))
    assert found.calls[0].measured_gb == 1.6
    assert "Of memory the largest error over 10 % is in rollout: predicted 2 GB, measured 1.6 GB" in sentence(
        found
    )


@pytest.mark.parametrize(
    "plan", [{}, {"predicted": None}, {"predicted": {"events": [3, {"name": "rollout", "kind": "call"}]}}]
)
def test_a_plan_without_a_prediction_has_no_section(run, plan):
    assert reconcile(run(plan)) is None
    assert reconciled_section(run(plan)) is None


def test_the_section_shows_every_call_and_the_step(run):
    shown = reconciled_section(run(plan_of(*EVENTS)))
    for text in ("rollout", "train_actor", "step", "an abacus", "2 s", "4 s"):
        assert text in shown
    assert shown.count("<rect") == 6
