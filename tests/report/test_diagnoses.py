"""Every rule speaks where a synthetic series shows its case, and is silent, or content, where it does not."""

from pathlib import Path

import numpy as np
import pytest

from meshift.report.run_data import Sample
from meshift.report.verdicts import RULES, diagnose

ROOT = Path(__file__).resolve().parents[2]
NUM = 50
NOISE = np.random.default_rng(0).normal(size=NUM)


def line(start, stop, noise=0.0, num=NUM):
    return (np.linspace(start, stop, num) + noise * NOISE[:num]).tolist()


def flat(value, noise=0.0):
    return line(value, value, noise)


LENGTHS = {"response_length/mean": flat(20)}
RISING = {"reward/mean": line(0, 3, 0.1)}


def samples(texts_of_step):
    return [
        Sample(step=s, index=i, prompt="p", completion=text, reward=0.0, truncated=False, fixed=False)
        for s in range(1, NUM + 1)
        for i, text in enumerate(texts_of_step(s))
    ]


def varied(step):
    return [f"one{step} two{i} three{step} four{i}" for i in range(4)]


def repeating(step):
    return varied(step) if step < NUM / 2 else ["great great great great"] * 4


ADAPTIVE = {"ppo": {"adaptive_kl": True, "kl_target": 6.0, "kl_target_unit": "sequence"}}
PAIRS = {"data": {"batch_size": 16}}
UNSCORED = {"objective/no_score_fraction": [0.5, 1.0]}
# rule, severity, metrics, config
SPEAKS = [
    ("reward", "good", {"reward/mean": line(0, 3, 0.3)}, {}),
    ("reward", "warning", {"reward/mean": line(3, 0, 0.3)}, {}),
    ("reward", "notice", {"reward/mean": flat(1, 0.3)}, {}),
    ("kl", "good", {"objective/kl": line(0, 3)} | LENGTHS, {}),
    ("kl", "notice", {"objective/kl": line(0, 12)} | LENGTHS, {}),
    ("kl", "warning", {"objective/kl": line(0, 40)} | LENGTHS, {}),
    ("kl", "warning", {"objective/kl": line(0, -4)} | LENGTHS, {}),
    ("kl", "warning", {"objective/kl": (5 * np.linspace(0, 1, NUM) ** 4).tolist()} | LENGTHS, {}),
    ("kl", "warning", {"objective/kl": line(0, 14)} | LENGTHS, ADAPTIVE),
    ("kl", "good", {"objective/kl": line(3, 5)} | LENGTHS, ADAPTIVE),
    # Beside their thresholds: 2.5 and 1.5 times the middle of the run; 60 % of few and of many pairs; .04 to .25.
    ("kl", "warning", {"objective/kl": [2.0] * 40 + [5.0] * 10} | LENGTHS, {}),
    ("kl", "good", {"objective/kl": [2.0] * 40 + [3.0] * 10} | LENGTHS, {}),
    ("chance", "warning", {"accuracy": flat(0.6)}, {"data": {"batch_size": 4}}),
    ("chance", "good", {"accuracy": flat(0.6)}, {"data": {"batch_size": 64}}),
    ("drift", "good", {"sync/logprob_diff_mean": flat(0.04)}, {}),
    ("drift", "notice", {"sync/logprob_diff_mean": flat(0.07)}, {}),
    ("drift", "notice", {"sync/logprob_diff_mean": flat(0.18)}, {}),
    ("drift", "warning", {"sync/logprob_diff_mean": flat(0.25)}, {}),
    ("entropy", "warning", {"actor/entropy": line(2, 0.1)}, {}),
    ("entropy", "notice", {"actor/entropy": line(2, 0.7)}, {}),
    ("entropy", "good", {"actor/entropy": line(2, 1.8)}, {}),
    ("truncation", "warning", {"response_length/clip_ratio": flat(0.8)}, {}),
    ("truncation", "notice", {"response_length/clip_ratio": line(0, 0.3)}, {}),
    ("truncation", "good", {"response_length/clip_ratio": flat(0.02)}, {}),
    ("value_function", "warning", {"critic/vf_explained_var": flat(-0.1)}, {}),
    ("value_function", "notice", {"critic/vf_explained_var": flat(0.1)}, {}),
    ("value_function", "good", {"critic/vf_explained_var": line(-1, 0.6)}, {}),
    ("clipping", "notice", {"actor/pg_clipfrac": flat(0.3)}, {}),
    ("clipping", "warning", {"actor/pg_clipfrac": line(0, 0.6)}, {}),
    ("early_stops", "notice", {"actor/early_stop": [0, 0, 1] * 9}, {}),
    ("early_stops", "warning", {"actor/early_stop": [1, 1, 0] * 9}, {}),
    ("no_signal", "notice", {"reward/std": [2.0] * 30 + [0.05] * 20}, {}),
    ("no_signal", "notice", {"objective/no_score_fraction": flat(0.5)}, {}),
    ("hacking", "notice", RISING | {"response_length/mean": line(20, 60)}, {}),
    ("hacking", "notice", RISING | {"response_length/mean": line(60, 20)}, {}),
    ("hacking", "notice", RISING | {"objective/kl": line(0, 40)} | LENGTHS, {}),
    ("hacking", "warning", RISING | {"objective/kl": line(0, 90), "response_length/mean": line(20, 60)}, {}),
    ("loss", "good", {"loss": line(2, 1, 0.1)}, {}),
    ("loss", "warning", {"loss": line(1, 2, 0.1)}, {}),
    ("loss", "notice", {"loss": flat(1, 0.1)}, {}),
    ("loss", "notice", {"loss": flat(1, 0.1), "eval/loss": [1.0, 0.995]}, {}),
    ("loss", "good", {"loss": flat(1, 0.1), "eval/loss": [1.0, 0.98, 0.97]}, {}),
    ("overfitting", "warning", {"loss": line(2, 0.5), "eval/loss": [2.0, 1.5, 1.4, 1.6, 1.9]}, {}),
    ("chance", "warning", {"rewards/accuracies": flat(0.52)}, PAIRS),
    ("chance", "good", {"rewards/accuracies": line(0.5, 0.9)}, PAIRS),
    ("chance", "warning", {"accuracy": line(0.5, 1.0), "eval/accuracy": [0.7]}, PAIRS),
    ("displacement", "notice", {"logps/chosen": line(-50, -90, 1), "rewards/margins": line(0, 4, 0.1)}, {}),
    ("not_finite", "warning", {"actor/grad_norm": [1.0, None, 1.0]}, {}),
    ("not_finite", "warning", {"actor/grad_norm": [1.0, None], "actor/early_stop": [1.0, 0.0]}, {}),
    ("not_finite", "warning", {"reward/mean": [None, None], **UNSCORED}, {}),
    ("not_finite", "warning", {"reward/reward_model": [1.0, None], **UNSCORED}, {}),
    ("spikes", "notice", {"actor/grad_norm": [*flat(1.0, 0.1), 30.0]}, {}),
    ("drift", "warning", {"sync/logprob_diff_mean": line(0.005, 0.1)}, {}),
    ("drift", "warning", {"sync/logprob_diff_mean": flat(0.5)}, {}),
    ("drift", "notice", {"sync/logprob_diff_mean": flat(0.1)}, {}),
    ("drift", "good", {"sync/logprob_diff_mean": flat(0.02)}, {}),
    ("drift", "warning", {"sync/logprob_diff_max": line(0.1, 3)}, {}),
    ("shortness", "notice", {"loss": [3.0, 2.0, 1.0]}, {}),
    ("completeness", "notice", {"loss": flat(1)}, {"max_steps": 100}),
]
SILENT = [
    ("reward", {"reward/mean": [1.0, 2.0, 3.0]}, {}),
    ("kl", {"objective/kl": line(0, 40)}, {}),
    ("truncation", {"response_length/clip_ratio": flat(1.0)}, {"ppo": {"length_limit_is_end": True}}),
    (
        "truncation",
        {"response_length/clip_ratio": flat(1.0)},
        {"generation": {"min_new_tokens": 20, "max_completion_length": 20}},
    ),
    ("clipping", {"actor/pg_clipfrac": flat(0.1)}, {}),
    ("early_stops", {"actor/early_stop": [0] * 20 + [1]}, {}),
    ("no_signal", {"reward/std": line(2, 1), "objective/no_score_fraction": flat(0.0)}, {}),
    ("hacking", RISING | LENGTHS | {"objective/kl": line(0, 3)}, {}),
    ("hacking", {"reward/mean": flat(1, 0.3), "response_length/mean": line(20, 60)}, {}),
    ("overfitting", {"loss": line(2, 0.5), "eval/loss": [2.0, 1.5, 1.4, 1.39, 1.4]}, {}),
    ("overfitting", {"loss": line(0.5, 2), "eval/loss": [1.0, 1.5, 2.0]}, {}),
    ("displacement", {"logps/chosen": flat(-50, 1), "rewards/margins": line(0, 4, 0.1)}, {}),
    ("not_finite", {"actor/grad_norm": flat(1.0)}, {}),
    ("not_finite", {"reward/mean": [1.0, None], "reward/std": [1.0, None], **UNSCORED}, {}),
    ("not_finite", {"reward/other_task": [None, None], "reward/other_task/spread": [1.0, None]}, {}),
    ("not_finite", {"actor/grad_norm": [1.0, None], "actor/early_stop": [0.0, 1.0]}, {}),
    ("spikes", {"actor/grad_norm": flat(1.0, 0.2)}, {}),
    ("shortness", {"loss": flat(1.0)}, {}),
    ("completeness", {"loss": flat(1.0)}, {"max_steps": NUM}),
]


@pytest.mark.parametrize(("rule", "severity", "metrics", "config"), SPEAKS)
def test_rule_speaks_with_the_severity_of_its_case(make_run, rule, severity, metrics, config):
    diagnosis = RULES[rule](make_run(metrics, config))
    assert diagnosis is not None
    assert (diagnosis.rule, diagnosis.severity) == (rule, severity), diagnosis.text
    assert set(diagnosis.metrics) & set(metrics) or not diagnosis.metrics


@pytest.mark.parametrize(("rule", "metrics", "config"), SILENT)
def test_rule_is_silent_where_its_case_is_not_there(make_run, rule, metrics, config):
    assert RULES[rule](make_run(metrics, config)) is None


def test_reward_that_rises_while_completions_become_copies_is_a_sign_of_hacking(make_run):
    hacked = RULES["hacking"](make_run(RISING, samples=samples(repeating)))
    assert hacked is not None
    assert hacked.severity == "warning"
    assert "variety" in hacked.text
    assert RULES["hacking"](make_run(RISING, samples=samples(varied))) is None


def test_fixed_prompts_do_not_count_as_variety_since_they_are_meant_to_repeat(make_run):
    fixed = [Sample(**{**vars(s), "fixed": True}) for s in samples(repeating)]
    assert RULES["hacking"](make_run(RISING, samples=fixed)) is None


def test_sentences_hold_the_figures_they_speak_of(make_run):
    diagnosis = RULES["entropy"](make_run({"actor/entropy": [2.0] * 10 + [0.1] * 40}))
    assert "2 to 0.1" in diagnosis.text
    lost = RULES["not_finite"](
        make_run({"actor/grad_norm": [1.0, None, 1.0], "critic/grad_norm": [1.0, 1.0, None]})
    )
    assert "actor/grad_norm at step 2" in lost.text
    assert "critic/grad_norm at step 3" in lost.text


def test_a_run_without_any_step_is_said_to_have_none_and_no_rule_breaks_on_it(make_run):
    (only,) = diagnose(make_run({}))
    assert only.rule == "completeness"
    assert "No step" in only.text


def test_a_run_of_nulls_breaks_no_rule(make_run):
    keys = {key for _, _, metrics, _ in SPEAKS for key in metrics}
    found = diagnose(make_run(dict.fromkeys(keys, [None] * NUM)))
    assert "not_finite" in {diagnosis.rule for diagnosis in found}


def test_warnings_come_first(make_run):
    metrics = {"reward/mean": line(0, 3, 0.1), "actor/entropy": line(2, 0.1), "actor/pg_clipfrac": flat(0.3)}
    assert [d.severity for d in diagnose(make_run(metrics))] == ["warning", "notice", "good"]


def test_every_rule_is_documented_and_has_a_case_here():
    text = (ROOT / "docs" / "report.md").read_text()
    assert not [rule for rule in RULES if f"`{rule}`" not in text]
    assert {rule for rule, *_ in SPEAKS} == set(RULES)
