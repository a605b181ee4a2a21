"""Configs as they are read: defaults, refusals, names."""

import pytest

from meshift.errors import ModelError
from meshift.models.hf.families import FAMILIES, hf_name, read_config
from meshift.models.shards import shard_table

RAW = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
QWEN2 = {**RAW, "architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 2}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_assumed_defaults_are_those_of_transformers(name):
    from transformers import CONFIG_MAPPING

    theirs = CONFIG_MAPPING[name]()
    for key, value in FAMILIES[name].defaults.items():
        if value is not None:
            assert getattr(theirs, key) == value, key


@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "qwen2-tied"])
@pytest.mark.parametrize("head", ["lm", "score"])
def test_names_are_those_of_transformers(saved, name, head):
    model = saved(name, head).model
    kind = "lm" if head == "lm" else "reward"
    config = read_config(model.config.to_dict() | {"architectures": [type(model).__name__]}, "here")
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {hf_name(config, kind, n): s.shape for n, s in shard_table(config, kind).items()} == theirs


def test_a_config_without_architectures_goes_by_its_model_type():
    raw = {key: value for key, value in RAW.items() if key != "architectures"} | {"model_type": "llama"}
    assert read_config(raw, "here").family == "llama"


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            {**RAW, "architectures": ["MambaForCausalLM"]},
            r"here is of an unsupported architecture \(MambaForCausalLM\); supported are LlamaForCausalLM, "
            "LlamaForSequenceClassification, Qwen2ForCausalLM, Qwen2ForSequenceClassification",
        ),
        ({"model_type": "mamba"}, "unsupported architecture .model_type 'mamba'."),
        ({**QWEN2, "use_sliding_window": True}, "here sets use_sliding_window, but sliding-window attention"),
        ({**RAW, "hidden_size": None}, "here lacks the key 'hidden_size'"),
        ({**RAW, "num_hidden_layers": 0}, "num_layers must be a whole number above zero, not 0"),
        ({**RAW, "vocab_size": "many"}, "vocab_size must be a whole number above zero, not 'many'"),
        ({**RAW, "num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({**RAW, "head_dim": 7}, "needs an even head_dim, not 7"),
        ({**RAW, "quantization_config": {"bits": 4}}, "describes a quantised model"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(raw, sentence):
    with pytest.raises(ModelError, match=sentence):
        read_config(raw, "here")
