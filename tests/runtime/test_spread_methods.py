"""Every method by a plan of three processes writes what one process writes."""

import json
import math

import pytest
from gang import run_gang
from spread_cases import CASES, check_weights, run

from meshift.report.device_chart import bars_of
from meshift.report.run_data import read_run
from meshift.runtime.observer import SilentObserver
from meshift.runtime.spread_run import run_share


def shares(rank, told):
    """Every case, one after another, in this process of three."""
    for argument in told:
        run_share(argument, rank, 3, SilentObserver())


@pytest.fixture(scope="module")
def spread(make_case, tmp_path_factory):
    """The folder of all runs by their plans, in one gang."""
    folder = tmp_path_factory.mktemp("spread")
    configs = {name: make_case(case, folder / name, plan=case.plan) for name, case in CASES.items()}
    told = [json.dumps({"run": type(c).__name__, "config": c.model_dump_json()}) for c in configs.values()]
    run_gang(3, shares, tmp_path_factory.mktemp("gang"), told)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_method_by_a_plan_would_write_something_else(spread, make_case, tmp_path, read_lines, name):
    case = CASES[name]
    alone = run(make_case(case, tmp_path / "run")).output_dir
    for file in ("metrics.jsonl", "samples.jsonl"):
        one, other = read_lines(spread / name / file), read_lines(alone / file)
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            kept = {key for key in theirs if not key.startswith(("timing_s/", "perf/"))}
            assert kept <= ours.keys()
            wrong = {key: (ours[key], theirs[key]) for key in kept if not is_close(ours[key], theirs[key])}
            assert not wrong, f"{file}: {wrong}"
    check_weights(spread / name, alone)
    if name.startswith("dapo"):
        rounds = [row["sampling/num_rounds"] for row in read_lines(spread / name / "metrics.jsonl")]
        assert max(rounds) > 1, "further rounds must be drawn"


def test_a_report_would_not_show_where_the_calls_of_a_loop_ran(spread):
    """ReMax has two calls of one name, and those of the step are shown; its loop is shown as one."""
    placed = {
        name: json.loads((spread / name / "placements.json").read_text()) for name in ("dapo", "remax-apart")
    }
    assert placed["dapo"]["sampling"] == [0, 1, 2]
    assert (placed["dapo"]["rollout"], placed["dapo"]["score"]) == ([1, 2], [2])
    assert placed["remax-apart"]["greedy_baseline"] == [0, 1, 2]
    bars = {bar.name: bar for bar in bars_of(read_run(spread / "dapo"))}
    assert {"sampling", "rollout", "score", "reward_functions", "train_actor"} <= bars.keys()
    assert bars["sampling"].start <= bars["rollout"].start
    assert bars["rollout"].seconds <= bars["sampling"].seconds


def is_close(ours, theirs):
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(ours) and math.isnan(theirs))
    return ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_a_call_would_be_predicted_that_no_run_times(spread, read_lines, name):
    written = json.loads((spread / name / "plan.json").read_text())
    row = read_lines(spread / name / "metrics.jsonl")[0]
    calls = {event["timed_as"] for event in written["predicted"]["events"] if event["kind"] == "call"}
    assert "train_actor" in calls or "train_reward" in calls
    assert calls <= {key.removeprefix("timing_s/") for key in row if key.startswith("timing_s/")}
    assert len(written["predicted"]["process_peak_bytes"]) <= 3
    trained = next(call for call in calls if call.startswith("train_"))
    assert row[f"perf/predicted_memory_gb/{trained}"] > 0
    assert written["plan"]
