"""Rotary frequencies and angles against `transformers`, at and beyond the original length."""

import json
import shutil

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from meshift.errors import ModelError
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.hf.load import load_config, load_model
from meshift.models.rotary import Rotary, longest_sequence


def angles(folder, length):
    return Rotary(load_config(folder))(torch.arange(length), torch.float32)


def expected_angles(saved, length):
    theirs = LlamaRotaryEmbedding(saved.model.config)
    cosine, sine = theirs(torch.zeros(1), torch.arange(length)[None])
    half = cosine.shape[-1] // 2
    return cosine[0, :, None, :half], sine[0, :, None, :half]


@pytest.mark.parametrize("name", ["llama", "rope-linear", "rope-llama3", "rope-yarn"])
def test_angles_match_transformers_far_beyond_the_original_length(saved, name):
    for ours, theirs in zip(angles(saved(name).folder, 300), expected_angles(saved(name), 300), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize(("name", "limit"), [("rope-dynamic", 64), ("rope-longrope", 32)])
def test_length_dependent_scalings_match_up_to_their_original_length_and_refuse_more(saved, name, limit):
    folder = saved(name).folder
    for ours, theirs in zip(angles(folder, limit), expected_angles(saved(name), limit), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0.0)
    with pytest.raises(ModelError, match=f"has {limit + 1} tokens.*original length of {limit}"):
        angles(folder, limit + 1)


def _old_llama(raw):
    parameters = raw.pop("rope_parameters")
    raw |= {"rope_theta": parameters.pop("rope_theta"), "rope_scaling": parameters}


def _old_without_scaling(raw):
    raw |= {"rope_theta": raw.pop("rope_parameters")["rope_theta"], "rope_scaling": None}


def _old_phi3(raw):
    _old_llama(raw)
    raw["partial_rotary_factor"] = raw["rope_scaling"].pop("partial_rotary_factor")
    raw["rope_scaling"]["type"] = raw["rope_scaling"].pop("rope_type")


def _old_gemma3(raw):
    full, local = (raw["rope_parameters"][f"{kind}_attention"] for kind in ("full", "sliding"))
    del raw["rope_parameters"]
    raw |= {
        "rope_theta": full.pop("rope_theta"),
        "rope_local_base_freq": local["rope_theta"],
        "rope_scaling": full,
    }


@pytest.mark.parametrize(
    ("name", "respell"),
    [
        ("rope-llama3", _old_llama),
        ("mistral", _old_without_scaling),
        ("phi3-longrope", _old_phi3),
        ("gemma3-scaled", _old_gemma3),
    ],
)
def test_the_old_spelling_of_rotary_settings_gives_the_same_logits_as_the_new(saved, tmp_path, name, respell):
    shutil.copytree(saved(name).folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    respell(raw)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    old, new = load_model(tmp_path), load_model(saved(name).folder)
    rows = (torch.arange(3, 33), packed_positions([30]), PackedAttention([30]))
    assert torch.equal(old(*rows), new(*rows))
    assert old.config.hf == raw  # transformers must not have written into the config we keep


@pytest.mark.parametrize(("family", "factor"), [("phi3", 0.4), ("phi3", 0.0)])
def test_a_part_of_a_head_that_cannot_be_turned_is_refused(saved, tmp_path, family, factor):
    shutil.copytree(saved(family).folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"]["partial_rotary_factor"] = factor
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"partial_rotary_factor turns \d of the 8 dims of a head"):
        load_model(tmp_path)


def test_an_unknown_scaling_is_named(saved, tmp_path):
    shutil.copytree(saved("llama").folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "spiral", "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=r"'spiral' in config.json is not known; supported are default, "):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": None}, r"lacks the key 'model_type'"),
        ({"model_type": "spiral"}, "cannot be read .*spiral"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, r"config\.json cannot be read .*factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rotary settings are rope_theta"),
        ({"rope_parameters": "yarn"}, "cannot be read .*rope_parameters"),
        ({"architectures": 3}, r"config\.json: architectures must be a list of names, not 3;"),
        ({"architectures": {"\n": None}}, r"config\.json: architectures must be a list of names"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers is above 10,000"),
        ({"num_labels": 10**400}, "num_labels is above 10,000"),
        ({"num_attention_heads": 0, "head_dim": None}, r"config\.json cannot be read"),
        ({"max_position_embeddings": "64"}, "max_positions must be a whole number"),
    ],
)
def test_a_config_of_wrong_types_ends_in_one_sentence(saved, tmp_path, changes, sentence):
    shutil.copytree(saved("llama").folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=sentence) as caught:
        longest_sequence(load_config(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "longest"),
    [("llama", 64), ("rope-yarn", 64), ("rope-longrope", 32), ("phi3-longrope", 32), ("gemma3", 64), ("gpt2", 64)],
)
def test_the_longest_sequence_is_the_models_positions_or_its_scalings_limit(saved, name, longest):
    assert longest_sequence(load_config(saved(name).folder)) == longest
