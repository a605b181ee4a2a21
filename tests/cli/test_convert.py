"""`meshift convert`: the copy holds the source's numbers, loads with `transformers`, and overwrites nothing."""

import json
import shutil

import pytest
import torch
from bad_input import edit_json, edit_weights, tree
from safetensors.torch import load_file

from meshift.cli.convert import parse_size
from meshift.cli.main import main


def convert(capsys, *words):
    code = main(["convert", *map(str, words)])
    return code, *capsys.readouterr()


def weights(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_a_copy_holds_the_same_numbers_and_loads_with_transformers(tiny_model, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code, out, err = convert(capsys, tiny_model, tmp_path / "copy", "--max-shard-size", "20KB")
    assert code == 0, err
    assert "every number is the source's own" in out
    assert len(list((tmp_path / "copy").glob("model-*.safetensors"))) > 1
    copy, source = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (tmp_path / "copy", tiny_model))
    assert source.keys() == copy.keys()
    assert all(torch.equal(source[name], copy[name]) for name in source)
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in (tmp_path / "copy", tiny_model)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"], "nothing unfinished stays"


def test_a_narrower_type_rounds_as_torch_does_and_says_so(tiny_model, tmp_path, capsys):
    code, out, _ = convert(capsys, tiny_model, tmp_path / "copy", "--dtype", "bfloat16")
    assert code == 0
    assert "rounded to bfloat16" in out
    source = weights(tiny_model)
    assert all(torch.equal(t, source[name].to(torch.bfloat16)) for name, t in weights(tmp_path / "copy").items())
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_reward_model_stays_one(tiny_reward, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    code, out, _ = convert(capsys, tiny_reward, tmp_path / "copy")
    assert code == 0
    assert "reward model" in out
    copy, source = (
        AutoModelForSequenceClassification.from_pretrained(f).score.weight
        for f in (tmp_path / "copy", tiny_reward)
    )
    assert torch.equal(copy, source)


def test_numbers_that_a_type_cannot_hold_are_named_and_nothing_is_written(tiny_model, tmp_path, capsys):
    folder = tmp_path / "large"
    shutil.copytree(tiny_model, folder)
    edit_weights(folder, lambda t: t["model.norm.weight"].fill_(1e5))
    before = tree(tmp_path)
    code, _, err = convert(capsys, folder, tmp_path / "copy", "--dtype", "float16")
    assert code == 2
    assert "model.norm.weight has numbers that float16 cannot hold (up to 1e+05)" in err
    assert tree(tmp_path) == before


def test_a_second_head_is_not_dropped_in_silence(tiny_reward, tmp_path, capsys):
    folder = tmp_path / "both"
    shutil.copytree(tiny_reward, folder)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    code, _, err = convert(capsys, folder, tmp_path / "copy")
    assert code == 2
    assert "holds lm_head.weight beside" in err
    assert not (tmp_path / "copy").exists()


def test_a_copy_that_reads_back_otherwise_is_refused(tiny_model, tmp_path, capsys, monkeypatch):
    from meshift.runtime import conversion

    whole = conversion.save_model

    def spoiled(model, folder, **options):
        whole(model, folder, **options)
        edit_weights(folder, lambda t: t["model.norm.weight"][3].add_(1))

    monkeypatch.setattr(conversion, "save_model", spoiled)
    code, _, err = convert(capsys, tiny_model, tmp_path / "copy")
    assert code == 1
    assert "model.norm.weight reads back as something else" in err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_a_full_one_kept(tiny_model, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert convert(capsys, tiny_model, tmp_path / "empty")[0] == 0
    before = tree(tmp_path)
    code, _, err = convert(capsys, tiny_model, tmp_path / "empty")
    assert code == 2
    assert "nothing is overwritten" in err
    assert tree(tmp_path) == before


def test_a_full_disk_is_found_before_anything_is_written(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    code, _, err = convert(capsys, tiny_model, tmp_path / "copy")
    assert code == 1
    assert "make room" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 5e8), ("2GiB", 2 * 2**30), ("1.5gb", 1.5e9), ("7", 7), (" 3 kb", 3000)]
)
def test_sizes_are_read_as_they_are_written(text, size):
    assert parse_size(text) == size


def test_a_model_of_several_labels_is_refused(tiny_reward, tmp_path, capsys):
    folder = tmp_path / "labels"
    shutil.copytree(tiny_reward, folder)
    edit_weights(folder, lambda t: t.update({"score.weight": torch.zeros(3, 32)}))
    edit_json(folder / "config.json", num_labels=3)
    code, _, err = convert(capsys, folder, tmp_path / "copy")
    assert code == 2
    assert "score.weight is [3, 32]" in err


def test_a_large_model_would_leave_one_wondering(tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("meshift.counted.PATIENCE_S", 0.0)
    monkeypatch.setattr("meshift.counted.BETWEEN_S", 0.0)
    code, _, err = convert(capsys, tiny_model, tmp_path / "copy", "--max-shard-size", "20KB")
    assert code == 0
    counts = [line.split("  elapsed")[0] for line in err.splitlines()]
    num = len(weights(tmp_path / "copy"))
    assert f"tensors of {tiny_model}: {num}/{num}" in counts
    assert f"tensors compared: {num}/{num}" in counts
    assert any(line.startswith("files written: ") for line in counts)
