"""`meshift dpo` on a tiny model: margins grow, and log-probs read in advance change nothing."""

import gc
import math
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from meshift.config.loading import make_config
from meshift.config.runs import DPORunConfig
from meshift.counted import heard_by
from meshift.errors import ConfigError, ModelError
from meshift.runtime import role_spec
from meshift.runtime.dpo_run import build_dpo_job, check_dpo, run_dpo
from meshift.runtime.observer import SilentObserver
from meshift.runtime.role_spec import LocalOpener

NAMES = (
    *("loss", "accuracy", "margin", "grad_norm", "lr", "logps/chosen", "logps/rejected"),
    *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
)
TIMES = ("timing_s/", "perf/")


class Listener(SilentObserver):
    """Remembers what it was told."""

    def __init__(self):
        self.messages = []

    def on_message(self, text):
        self.messages.append(text)


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


@pytest.fixture(scope="module")
def finished(dpo_config_on_disk, tmp_path_factory):
    return run_dpo(dpo_config_on_disk(tmp_path_factory.mktemp("runs") / "one", eval_steps=5), SilentObserver())


def test_margins_grow_on_the_pairs_and_on_new_ones(finished, read_lines):
    rows = read_lines(finished.output_dir / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.1
    assert rows[-1]["accuracy"] >= 0.9
    heldout = [row for row in rows if "eval/margin" in row]
    assert [row["training/global_step"] for row in heldout] == [5, 10, 12]
    assert heldout[-1]["eval/margin"] > heldout[0]["eval/margin"]
    assert heldout[-1]["eval/accuracy"] >= 0.9
    assert heldout[-1]["eval/loss"] < heldout[0]["eval/loss"]
    assert all(set(NAMES) <= set(row) for row in rows)


def test_the_saved_actor_loads_in_transformers_and_is_another_than_before(finished, actor_folder):
    ours, before = (AutoModelForCausalLM.from_pretrained(path) for path in (finished.final_dir, actor_folder))
    assert not torch.equal(ours.lm_head.weight, before.lm_head.weight)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_log_probs_read_in_advance_give_the_same_run_to_the_last_bit(
    dpo_config_on_disk, tmp_path, read_lines, loss_type
):
    runs = []
    for once in (False, True):
        dpo = {"precompute_ref_log_probs": once, "loss_type": loss_type}
        config = dpo_config_on_disk(tmp_path / f"{once}", max_steps=3, eval_steps=1, dpo=dpo)
        result = run_dpo(config, SilentObserver())
        rows = without_times(read_lines(result.output_dir / "metrics.jsonl"))
        runs.append((rows, (result.final_dir / "model.safetensors").read_bytes()))
    assert runs[0] == runs[1]


def test_a_reference_that_was_read_in_advance_is_gone_and_serves_every_epoch(
    dpo_config_on_disk, tmp_path, monkeypatch
):
    opened = []
    plain_open = role_spec.open_model

    def remembering_open(*args, **kwargs):
        gc.collect()
        opened.append(
            (len([1 for _, alive in opened if alive() is not None]), model := plain_open(*args, **kwargs))
        )
        opened[-1] = (opened[-1][0], weakref.ref(model))
        return model

    monkeypatch.setattr(role_spec, "open_model", remembering_open)
    listener = Listener()
    config = dpo_config_on_disk(tmp_path / "run", num_train_epochs=2.0, dpo={"precompute_ref_log_probs": True})
    job = build_dpo_job(config, LocalOpener(listener))
    assert [alive for alive, _ in opened] == [0, 0], "the reference has gone before the actor comes"
    assert set(job.roles) == {"actor"}
    assert listener.messages[0] == "the reference reads 45 pairs, once"
    first = {}
    for step in range(6):
        batch = job.next_batch(step)
        for row, value in zip(batch["chosen"].rows(), batch["ref_chosen_logps"].values.tolist(), strict=True):
            assert math.isfinite(value)
            assert first.setdefault(tuple(row.tolist()), value) == pytest.approx(value, abs=1e-4)
    assert len(first) > 1


def test_a_batch_size_that_does_not_divide_the_pairs_leaves_none_unread(dpo_config_on_disk, pairs_files, tmp_path):
    data = {"dataset_name": pairs_files[0], "batch_size": 14}
    config = dpo_config_on_disk(tmp_path / "run", data=data, dpo={"precompute_ref_log_probs": True})
    job = build_dpo_job(config)
    for step in range(12):
        assert job.next_batch(step)["ref_rejected_logps"].values.isfinite().all()


def test_only_pairs_that_a_step_will_read_are_read_in_advance(dpo_config_on_disk, tmp_path):
    listener = Listener()
    config = dpo_config_on_disk(tmp_path / "run", max_steps=2, dpo={"precompute_ref_log_probs": True})
    build_dpo_job(config, LocalOpener(listener))
    assert listener.messages == ["the reference reads 30 pairs, once"]


def test_reading_the_reference_once_tells_how_far_it_is(dpo_config_on_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("meshift.counted.PATIENCE_S", 0.0)
    monkeypatch.setattr("meshift.counted.BETWEEN_S", 0.0)
    config, told = dpo_config_on_disk(tmp_path / "run", max_steps=2, dpo={"precompute_ref_log_probs": True}), []
    with heard_by(lambda *count: told.append(count)):
        build_dpo_job(config)
    assert [one for one in told if one[0].startswith("batches")] == [
        ("batches that the reference has read", n, 2) for n in (1, 2)
    ]


def test_held_out_pairs_follow_a_reference_that_moves(dpo_config_on_disk, tmp_path, read_lines):
    """With alpha = 1 the reference becomes the actor at the end of each step: no margin is left."""
    follows = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0}
    result = run_dpo(
        dpo_config_on_disk(tmp_path / "run", max_steps=2, eval_steps=1, reference=follows), SilentObserver()
    )
    rows = read_lines(result.output_dir / "metrics.jsonl")
    assert [row["eval/loss"] for row in rows] == pytest.approx([math.log(2)] * 2, abs=1e-5)


def test_a_dry_run_of_dpo_shows_the_batch_arithmetic(dpo_config_on_disk, actor_folder, tmp_path):
    rows = dict(check_dpo(dpo_config_on_disk(tmp_path / "never")))
    assert rows["batch"] == "15 pairs = 30 texts per update"
    assert rows["steps"] == "12, 4.00 passes over the pairs"
    assert rows["reference model"] == rows["actor model"] == str(actor_folder)
    assert rows["reference"] == "read in every step"
    assert "weights" not in rows
    assert not (tmp_path / "never").exists()
    once = dict(check_dpo(dpo_config_on_disk(tmp_path / "never", dpo={"precompute_ref_log_probs": True})))
    assert once["reference"] == "read once, before the first step, then dropped"


def test_a_reference_with_another_tokenizer_is_refused(dpo_config_on_disk, make_folder, tmp_path):
    other = str(make_folder(words=("another", "vocabulary")))
    with pytest.raises(ModelError, match=r"the reference model .* has another tokenizer"):
        check_dpo(dpo_config_on_disk(tmp_path / "run", reference={"model_name_or_path": other}))


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"dpo": {"loss_type": "ipo", "label_smoothing": 0.1}}, "label_smoothing is of loss_type sigmoid"),
        (
            {"dpo": {"precompute_ref_log_probs": True}, "reference": {"sync_ref_model": True}},
            "set one of them to false",
        ),
        ({"actor": {"learning_rate": 1e-4}}, "`actor.model_name_or_path` is needed"),
        ({"eval_steps": 5}, "`eval_steps` is set without `data.eval_dataset_name`"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(sections, sentence):
    values = {"output_dir": "runs/x", "data": {"dataset_name": "d"}, "actor": {"model_name_or_path": "m"}}
    with pytest.raises(ConfigError, match=sentence):
        make_config(DPORunConfig, values | sections)


def test_a_margin_column_that_dpo_does_not_read_is_mentioned(dpo_config_on_disk, write_jsonl, tmp_path):
    rows = [{"prompt": "the film was", "chosen": " good", "rejected": " bad", "margin": 1.0}]
    data = {"dataset_name": write_jsonl(tmp_path / "train.jsonl", rows)}
    job = build_dpo_job(dpo_config_on_disk(tmp_path / "run", data=data))
    assert "DPO does not read it" in job.messages[-1]
    assert "train.jsonl:1" in job.messages[-1]
