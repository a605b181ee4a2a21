"""The study's runs: which there are, that finished ones stay, that the report says what was found."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from meshift.config.loading import load_config
from meshift.errors import ConfigError
from meshift.evaluation.tasks import Question
from meshift.report.interval_chart import Mark, Span, Track, interval_chart
from meshift.report.line_chart import Caption
from recipes.study import code, sentiment
from recipes.study.__main__ import main
from recipes.study.code_reward import before
from recipes.study.code_section import code_findings
from recipes.study.findings import Place, ablation_findings, direction, sentiment_findings
from recipes.study.intervals import Mean
from recipes.study.judging import Judged, preferences
from recipes.study.page import Done, study_page
from recipes.study.points import METHODS, config_of, points_of
from recipes.study.sentiment import SentimentStudy
from recipes.study.setting import CodeSetting, StudySetting

STUDY = Path(__file__).parents[2] / "recipes" / "study"
HOSTILE = "<script>alert(1)</script>"


def setting_of(name="small.yaml", *overrides):
    return load_config(StudySetting, STUDY / name, overrides)


@pytest.mark.parametrize("name", ["small.yaml", "full.yaml"])
def test_a_setting_would_name_a_key_that_is_gone_or_two_points_would_be_one_run(name, tmp_path):
    setting = setting_of(name).sentiment
    study = SentimentStudy(setting, tmp_path, print)
    keys = [study.key(point) for point in study.points]
    assert len(set(keys)) == len(keys)
    done = set()
    for point in study.points:
        assert set(point.parents) <= done, f"{point.name} would be run before what it needs"
        done.add(point.name)


def test_a_policy_would_start_from_or_be_held_to_the_wrong_model(tmp_path):
    setting = setting_of().sentiment
    by_name = {point.name: config_of(point, setting, tmp_path) for point in points_of(setting)}
    after, dpo, ppo = by_name["dpo_after_sft_0.1_seed0"], by_name["dpo_0.5_seed0"], by_name["ppo_0.2_seed0"]
    assert after.actor.model_name_or_path == str(tmp_path / "sft_24_seed0" / "final")
    assert dpo.actor.model_name_or_path == ppo.actor.model_name_or_path == str(tmp_path / "reference" / "final")
    assert ppo.reward.model_name_or_path == str(tmp_path / "reward_seed0" / "final")
    assert (dpo.dpo.beta, ppo.ppo.kl_coef) == (0.5, 0.2)
    assert ppo.generation.min_new_tokens == ppo.generation.max_completion_length == setting.completion_length
    factors = by_name["ablation_BE_seed0"]
    assert (factors.ppo.whiten_advantages, factors.reference.sync_ref_model) == (False, True)
    sizes = {name: config.data.batch_size * config.max_steps for name, config in by_name.items() if "abl" in name}
    assert len(set(sizes.values())) == 1, "the ablation would compare different numbers of completions"


def test_a_change_would_not_reach_the_points_that_rest_on_it_or_would_reach_others(tmp_path):
    def keys(*overrides):
        study = SentimentStudy(setting_of("small.yaml", *overrides).sentiment, tmp_path, print)
        return {point.name: study.key(point) for point in study.points}

    before = keys()
    moved = SentimentStudy(setting_of().sentiment, tmp_path / "elsewhere", print)
    assert {point.name: moved.key(point) for point in moved.points} == before
    after = keys("sentiment.reward=[max_steps=49]")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith(("reward", "ppo", "online_dpo", "ablation"))}
    assert all(before[name] != key for name, key in keys("sentiment.reference=[max_steps=31]").items())
    after = keys("sentiment.pairs.num_completions=5")
    assert {name for name in before if before[name] == after[name]} == {"reference"}


def test_dpo_after_sft_without_sft_would_be_found_out_late():
    with pytest.raises(ConfigError, match="give that method a sweep too"):
        setting_of("small.yaml", "sentiment.sweeps.sft=null")


@pytest.fixture
def faked(monkeypatch):
    """Trains nothing: every run leaves a model folder, and every policy is judged alike."""
    runs = []

    def run(config, observer):
        runs.append(Path(config.output_dir).name)
        if runs[-1] == "interrupt me":
            raise KeyboardInterrupt
        (Path(config.output_dir) / "final").mkdir(parents=True)
        return SimpleNamespace(metrics={"eval/accuracy": 0.75})

    judged = Judged(true=[0.1, 0.3], proxy=[1.0, 2.0], kl=[0.5, 0.7], distinct2=0.9, texts=[["An", HOSTILE]])
    monkeypatch.setattr(sentiment, "METHODS", {name: replace(m, run=run) for name, m in METHODS.items()})
    monkeypatch.setattr(sentiment, "judge", lambda *given: judged)
    rows = [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad"} for i in range(6)]
    monkeypatch.setattr(sentiment, "draw_pairs", lambda *given: rows)
    return runs


def small(tmp_path):
    few = [
        "sentiment.pairs.num_heldout=2",
        *(f"sentiment.sweeps.{name}.strengths=[0.1]" for name in METHODS_SWEPT),
    ]
    return setting_of("small.yaml", f"output_dir={tmp_path}", "sentiment.ablation=null", *few).sentiment


METHODS_SWEPT = ("dpo", "dpo_after_sft", "online_dpo", "ppo")


def test_a_broken_off_study_would_run_finished_points_again_or_miss_some(faked, tmp_path, monkeypatch):
    def stop(results):
        if len(results) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SentimentStudy(small(tmp_path), tmp_path, print).run(stop)
    begun = list(faked)
    assert len(begun) == 4
    results = SentimentStudy(small(tmp_path), tmp_path, print).run(lambda results: None)
    names = [point.name for point in points_of(small(tmp_path))]
    assert faked == names == list(results)
    again = SentimentStudy(small(tmp_path), tmp_path, print).run(lambda results: None)
    assert faked == names
    assert again == results


def test_weights_that_others_start_from_would_go_or_others_would_stay(faked, tmp_path):
    SentimentStudy(small(tmp_path), tmp_path, print).run(lambda results: None)
    kept = {path.parent.name for path in tmp_path.glob("*/final")}
    assert kept == {"reference", "reward_seed0", "sft_24_seed0"}
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    heldout = [json.loads(line) for line in (tmp_path / "pairs-heldout.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows + heldout] == [f"p{i}" for i in range(6)]
    assert json.loads((tmp_path / "chosen.jsonl").read_text().splitlines()[0])["completion"] == "good"


def test_the_page_would_lack_a_point_or_let_a_completion_in_as_markup(faked, tmp_path):
    setting = setting_of().model_copy(update={"sentiment": small(tmp_path)})
    results = SentimentStudy(setting.sentiment, tmp_path, print).run(lambda results: None)
    facts = {"date": "2026-11-28", "machine": "a machine"}
    page = study_page(setting, Done(sentiment=results), facts)
    assert HOSTILE not in page
    assert not re.search(r'(?:src|href)="', page)
    for words in ("DPO after SFT beta 0.1", "iterative DPO beta 0.1", "PPO kl_coef 0.1", "0.750"):
        assert words in page
    alone = {**results["reference"], "kl": [0.0, 0.0], "proxy": []}
    assert "0.200" in study_page(setting, Done(sentiment={"reference": alone}), facts), "while it runs"


def test_the_worse_completion_would_be_chosen_or_a_tie_would_make_a_pair():
    texts = ["a1", "a2", "a3", "b1", "b2", "b3", "c1", "c2", "c3"]
    rows = preferences(["a", "b", "c"], texts, [0.1, 0.5, 0.0, 0.2, 0.2, 0.2, 0.9, -0.9, 0.9])
    found = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    assert found == [("a", "a2", "a3"), ("c", "c1", "c2")]


def place(method, true, strength=0.1):
    run = {"true": true, "proxy": true, "kl": [1.0] * len(true), "distinct2": 1.0, "texts": [], "train_seconds": 1}
    return Place(method=method, strength=strength, runs=[run])


def test_a_finding_would_be_called_agreement_whatever_came_out():
    assert [direction(Mean(value=v, low=low, high=high, count=5)) for v, low, high in SPANS] == [
        "agrees",
        "contradicts",
        "open",
    ]
    low, high = [0.1, 0.2, 0.3, 0.25], [0.61, 0.69, 0.8, 0.76]
    found = {f.claim[:8]: f.verdict for f in sentiment_findings([place("ppo", high), place("dpo", low)])}
    turned = {f.claim[:8]: f.verdict for f in sentiment_findings([place("ppo", low), place("dpo", high)])}
    assert (found["PPO reac"], turned["PPO reac"]) == ("one seed agrees", "one seed contradicts")


def test_prompts_would_make_up_for_seeds():
    worse = place("dpo", [0.1] * 8).runs
    seeds = [[0.9] * 8, [0.0] * 8]  # one run far above, one below: over prompts a sure gain, over runs none
    better = Place(method="ppo", strength=0.1, runs=[place("ppo", true).runs[0] for true in seeds])
    (found,) = sentiment_findings([better, Place(method="dpo", strength=0.1, runs=[*worse, *worse])])
    assert found.verdict == "open"
    assert "difference over seeds 0.350" in found.figures


def test_going_furthest_would_pass_for_being_best():
    far, near, other = place("ppo", [0.9, 0.8]), place("ppo", [0.3, 0.2], 0.5), place("dpo", [0.5, 0.4])
    far.runs[0]["kl"] = [9.0, 9.0]
    (found,) = sentiment_findings([far, near, other])
    assert "with at most that KL it reaches 0.250" in found.figures
    (found,) = sentiment_findings([far, other])
    assert "none of its points has a KL of at most 1.0" in found.figures


SPANS = ((0.5, 0.1, 0.9), (-0.5, -0.9, -0.1), (0.1, -0.1, 0.3))


def test_a_factor_would_be_credited_with_another_ones_effect():
    lucks = iter((0.02, -0.03, 0.01, 0.0))
    runs = [
        ({"A": a, "B": b}, {"true": [0.1 + 0.5 * a + luck + noise for noise in (0.0, 0.1, 0.05)]})
        for a in (True, False)
        for b, luck in ((True, next(lucks)), (False, next(lucks)))
    ]
    found = {f.claim: f for f in ablation_findings(runs)}
    assert found["PPO: A raises the true reward"].verdict == "agrees"
    assert found["PPO: B raises the true reward"].verdict == "open"
    assert (
        "over 2 pairs of runs that differ in nothing else 0.490" in found["PPO: A raises the true reward"].figures
    )


def test_a_mark_would_stand_elsewhere_than_its_values_say():
    marks = [Mark(x=Span.exactly(x), y=Span(value=y, low=y - 1, high=y + 1)) for x, y in ((0.0, 1.0), (10.0, 9.0))]
    chart = interval_chart(Caption(title="T", key="up"), [Track(label="a", marks=marks)], "across")
    found = re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)%"', chart)
    (x0, y0), (x1, y1) = [(float(x), float(y)) for x, y in found]
    ticks = {text: float(y) for y, text in re.findall(r'y="([\d.]+)%" dy="0.32em" class="y">([\d.]+)<', chart)}
    per_unit = (ticks["5.0"] - ticks["10.0"]) / 5 if "5.0" in ticks else (ticks["0"] - ticks["10"]) / 10
    assert y0 - y1 == pytest.approx(8 * per_unit, abs=0.1)
    assert x1 > x0
    assert chart.count("whisker") == 2, "an exact value has none"


def test_a_wrong_key_would_end_in_a_traceback(capsys):
    assert main(["theory.num_seed=3"]) == 2
    assert "did you mean `theory.num_seeds`?" in capsys.readouterr().err


def test_problems_would_be_trained_on_that_models_are_judged_on(tmp_path, monkeypatch):
    questions = [
        Question(
            id=str(i), prompt=f"p{i}", row={"test_list": [f"assert f() == {i}"], "code": f"a\r\n{i}"}, where=""
        )
        for i in range(9)
    ]
    monkeypatch.setattr(code, "load_questions", lambda task, name: questions)
    code.write_training_problems(CodeSetting(num_heldout=4, num_train=3), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["test_list"]) for row in rows] == [
        (f"p{i}", [f"assert f() == {i}"]) for i in (4, 5, 6)
    ]
    solutions = [json.loads(line) for line in (tmp_path / "solutions.jsonl").read_text().splitlines()]
    assert solutions == [{"prompt": f"p{i}", "completion": f"a\n{i}"} for i in (4, 5, 6)]


@pytest.mark.parametrize("name", ["small.yaml", "full.yaml"])
def test_ppo_on_code_would_not_start_from_the_fine_tuned_model(name, tmp_path):
    setting = setting_of(name).code
    tuned, policy = code.tuning_of(setting, tmp_path), code.ppo_of(setting, tmp_path)
    assert policy.actor.model_name_or_path == f"{tuned.output_dir}/final"
    bare = setting.model_copy(update={"sft": None, "model": "larger"})
    assert code.tuning_of(bare, tmp_path) is None
    assert code.ppo_of(bare, tmp_path).actor.model_name_or_path == "larger"
    assert (
        code.tuning_of(setting.model_copy(update={"model": "larger"}), tmp_path).model.model_name_or_path
        == "larger"
    )


def test_a_wrong_sample_would_count_as_right_or_after_as_before():
    lines = [json.dumps({"id": i, "sample": s, "right": s < n}) for i, n in (("a", 0), ("b", 2)) for s in range(4)]
    counts = code.counts_of(lines)
    assert counts == {"a": [4, 0], "b": [4, 2]}
    assert code.rates(counts, 1) == [0.0, 0.5]
    assert code.rates(counts, 2) == pytest.approx([0.0, 1 - 1 / 6])
    stages = {"before": {i: [4, 4] for i in "abc"}, "start": {"a": [4, 0], "b": [4, 0], "c": [4, 1]}}
    result = {"stages": {**stages, "end": {i: [4, 4] for i in "abc"}}}
    one, five = code_findings(CodeSetting(ks=[1, 4]), result)
    assert (one.verdict, five.claim) == ("agrees", "Code: PPO with unit tests raises pass@4")
    assert "0.083" in one.figures


def test_what_follows_a_program_would_be_run_with_it():
    assert before("def f():\n    return 1\nassert f(", ("\nassert ", "\nprint(")) == "def f():\n    return 1"
    assert before("x = 1\nprint(x)\nassert x", ("\nassert ", "\nprint(")) == "x = 1"
    assert before("x = 1", ("\nassert ",)) == "x = 1"
