"""`meshift kto`, `orpo` and `simpo` on a tiny model: what they learn, say and refuse."""

import json

import pytest
from transformers import AutoModelForCausalLM

from meshift.config.loading import make_config
from meshift.config.runs import KTORunConfig, ORPORunConfig, SimPORunConfig
from meshift.errors import ConfigError
from meshift.runtime.kto_run import build_kto_job, check_kto, run_kto
from meshift.runtime.memory import held_models
from meshift.runtime.observer import SilentObserver
from meshift.runtime.pair_run import check_pairs, run_pairs


@pytest.fixture
def config_on_disk(actor_folder, judged_files, pairs_files, tmp_path):
    def make(schema, **sections):
        train, heldout = judged_files if schema is KTORunConfig else pairs_files
        values = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 12,
            "dtype": "float32",
            "report_to": [],
            "data": {"dataset_name": train, "eval_dataset_name": heldout, "batch_size": 15},
            "actor": {"model_name_or_path": str(actor_folder), "learning_rate": 5e-3},
        }
        return make_config(schema, values | sections)

    return make


@pytest.mark.parametrize(
    ("schema", "run"), [(KTORunConfig, run_kto), (ORPORunConfig, run_pairs), (SimPORunConfig, run_pairs)]
)
def test_margins_grow_on_the_rows_and_on_new_ones(config_on_disk, read_lines, schema, run):
    result = run(config_on_disk(schema, eval_steps=6), SilentObserver())
    rows = read_lines(result.output_dir / "metrics.jsonl")
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] + 0.05
    heldout = [row for row in rows if "eval/margin" in row]
    assert [row["training/global_step"] for row in heldout] == [6, 12]
    assert heldout[-1]["eval/margin"] > heldout[0]["eval/margin"]
    assert heldout[-1]["eval/loss"] < heldout[0]["eval/loss"]
    assert {"loss", "grad_norm", "lr", "logps/chosen", "rewards/rejected"} <= set(rows[0])
    AutoModelForCausalLM.from_pretrained(result.final_dir)


def test_with_the_reference_as_actor_half_of_every_weight_is_lost_at_first(config_on_disk, read_lines):
    result = run_kto(config_on_disk(KTORunConfig, max_steps=1), SilentObserver())
    (row,) = read_lines(result.output_dir / "metrics.jsonl")
    assert row["loss"] == pytest.approx(0.5, abs=1e-6)
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)


def test_a_pair_is_taken_apart_into_one_that_was_liked_and_one_that_was_not(config_on_disk, pairs_files):
    data = {"dataset_name": pairs_files[0], "batch_size": 90, "shuffle": False}
    batch = build_kto_job(config_on_disk(KTORunConfig, data=data)).next_batch(0)
    assert batch["label"].values.tolist() == [True, False] * 45
    sizes = batch["num_prompt_tokens"].values.tolist()
    texts = [row.tolist() for row in batch["tokens"].rows()]
    assert all(texts[i][: sizes[i]] == texts[i + 1][: sizes[i]] for i in range(0, 90, 2))
    assert all(texts[i] != texts[i + 1] for i in range(0, 90, 2))


def test_the_rows_of_a_pair_would_be_each_others_mismatched_texts(config_on_disk, tmp_path, write_jsonl):
    """No two rows say the same, so whose completion stands after a prompt can be told."""
    nouns = ("film", "story", "the", "it", "and", "not")
    rows = [{"prompt": f"a {noun}", "chosen": f" good {noun}", "rejected": f" bad {noun}"} for noun in nouns]
    data = {"dataset_name": write_jsonl(tmp_path / "pairs.jsonl", rows), "batch_size": 12, "shuffle": False}
    batch = build_kto_job(config_on_disk(KTORunConfig, data=data)).next_batch(0)
    sizes = batch["num_prompt_tokens"].values.tolist()
    texts = [row.tolist() for row in batch["tokens"].rows()]
    parts = [(text[:n], text[n:]) for text, n in zip(texts, sizes, strict=True)]
    others = [row.tolist() for row in batch["mismatched"].rows()]
    assert len({tuple(said) for _, said in parts}) == 12
    for (prompt, _), other in zip(parts, others, strict=True):
        assert other[: len(prompt)] == prompt
        (owner,) = [one for one, said in parts if said == other[len(prompt) :]]
        assert owner != prompt
    taken = [other[n:] for other, n in zip(others, sizes, strict=True)]
    assert sorted(taken) == sorted(said for _, said in parts), "every completion counts once"


def test_steps_with_one_prompt_only_are_told(config_on_disk, tmp_path):
    rows = [
        {"prompt": "the film", "completion": f" was {what}", "label": True} for what in ("good", "bad", "a story")
    ]
    file = tmp_path / "one.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = config_on_disk(KTORunConfig, data={"dataset_name": str(file), "batch_size": 2}, max_steps=3)
    told = dict(check_kto(config))["KL term"]
    assert told.startswith("in 3 of 3 steps all completions are of one prompt")
    assert told in build_kto_job(config).messages
    assert "KL term" not in dict(check_kto(config_on_disk(KTORunConfig)))


def test_a_dry_run_says_how_likes_and_dislikes_are_balanced(config_on_disk, actor_folder):
    config = config_on_disk(KTORunConfig, kto={"desirable_weight": 1.2})
    rows = dict(check_kto(config))
    assert rows["completions"] == "60, 30 of them desirable (0 over-long and 0 blank left out)"
    assert rows["weights"].startswith("desirable to undesirable, weighted: 1.20 ")
    assert rows["reference model"] == rows["actor model"] == str(actor_folder)
    assert [one.role for one in held_models(config)] == ["actor", "reference"]


def test_no_reference_is_held_where_none_is_read(config_on_disk):
    config = config_on_disk(ORPORunConfig)
    assert "reference model" not in dict(check_pairs(config))
    assert [one.role for one in held_models(config)] == ["actor"]
    with pytest.raises(ConfigError, match="reference"):
        config_on_disk(ORPORunConfig, reference={"sync_ref_model": True})


def test_one_completion_has_no_other_to_be_mismatched_with(config_on_disk, judged_files):
    with pytest.raises(ConfigError, match=r"data\.batch_size"):
        config_on_disk(KTORunConfig, data={"dataset_name": judged_files[0], "batch_size": 1})
