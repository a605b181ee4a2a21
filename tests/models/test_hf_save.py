"""Folders out: bit for bit, loadable in `transformers`, whole or not at all."""

import json

import pytest
import torch
from family_variants import EACH_FAMILY
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from meshift.errors import InputError, SaveError
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.hf.load import load_model, load_tokenizer
from meshift.models.hf.save import save_model

TOKENS = torch.arange(3, 20)


def same_bytes(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


@pytest.mark.parametrize("name", [*EACH_FAMILY, "llama", "llama-tied", "qwen2-tied", "phi3-longrope", "rope-yarn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unmodified_language_model_comes_out_bit_for_bit(saved, tmp_path, name, dtype):
    source = saved(name).folder
    if dtype == torch.bfloat16:
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(tmp_path / "bf16")
        source = tmp_path / "bf16"
    save_model(load_model(source), tmp_path / "out")
    same_bytes(load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"))
    for file in ("config.json", "generation_config.json"):
        assert json.loads((source / file).read_text()) == json.loads((tmp_path / "out" / file).read_text())


@pytest.mark.parametrize(
    ("name", "head"),
    [(name, head) for name in (*EACH_FAMILY, "llama-tied") for head in ("lm", "reward")] + [("llama", "value")],
)
def test_what_is_saved_gives_the_same_outputs_in_transformers(saved, tmp_path, name, head):
    ours = load_model(saved(name, "lm" if head == "lm" else "score").folder, head=head)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.01)
        hidden = ours(TOKENS, packed_positions([17]), PackedAttention([17]))
        expected = ours.head(hidden)
        save_model(ours, tmp_path / "out")
        auto = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
        theirs, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
        logits = theirs(TOKENS[None]).logits
    assert not any(report.values())
    if head == "lm":
        torch.testing.assert_close(expected, logits[0], atol=1e-4, rtol=0.0)
    else:
        assert logits.shape == (1, 1)
        torch.testing.assert_close(expected[-1], logits[0, 0], atol=1e-4, rtol=0.0)
        theirs(TOKENS[:16].view(2, 8))  # refused by transformers where no padding token is set


def test_a_reward_model_made_from_a_language_model_can_be_turned_back(saved, tmp_path):
    source = saved("llama-tied").folder
    save_model(load_model(source, head="reward"), tmp_path / "reward")
    raw = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForSequenceClassification"]
    assert "lm_head.weight" not in load_file(tmp_path / "reward" / "model.safetensors")
    save_model(load_model(tmp_path / "reward"), tmp_path / "lm")
    assert json.loads((tmp_path / "lm" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_the_config_says_the_dtype_the_weights_were_cast_to(saved, tmp_path):
    save_model(load_model(saved("llama").folder, dtype=torch.bfloat16), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_saved_in_parts_that_transformers_loads(saved, tmp_path):
    save_model(load_model(saved("llama").folder), tmp_path / "out", max_shard_bytes=20_000)
    parts = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(parts) > 2
    assert parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    same_bytes(saved("llama").model.state_dict(), theirs)


def test_saving_over_a_model_leaves_none_of_its_weights_and_all_other_files(saved, tmp_path):
    save_model(load_model(saved("llama").folder), tmp_path / "out", max_shard_bytes=20_000)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    save_model(load_model(saved("qwen2").folder), tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "generation_config.json", "model.safetensors", "notes.txt"}
    assert load_model(tmp_path / "out").config.family == "qwen2"


def test_a_save_that_breaks_off_leaves_nothing_that_looks_like_a_model(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("meshift.models.hf.save.save_file", full)
    with pytest.raises(SaveError, match=r"could not be saved to .*out \(No space left") as caught:
        save_model(load_model(saved("llama").folder), tmp_path / "out")
    assert not isinstance(caught.value, InputError), "a full disk is no mistake in the config"
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_files_go_along(saved, tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="b")
    save_model(load_model(saved("llama").folder), tmp_path / "out", tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "out").get_vocab() == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 0), ({"pad_token_id": None}, 2), ({"pad_token_id": None, "eos_token_id": [7, 8]}, 7)],
)
def test_a_saved_reward_model_has_a_padding_token(saved, tmp_path, changes, expected):
    import shutil

    shutil.copytree(saved("llama").folder, tmp_path / "in")
    raw = json.loads((tmp_path / "in" / "config.json").read_text()) | changes
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw))
    save_model(load_model(tmp_path / "in", head="reward"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == expected
