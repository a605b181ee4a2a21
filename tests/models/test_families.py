"""Configs as they are read: defaults, refusals, names."""

from dataclasses import fields

import pytest
from family_variants import EACH_FAMILY, VARIANTS

from meshift.errors import ModelError
from meshift.models.hf.families import FAMILIES, read_config
from meshift.models.hf.stored import stored_tensors

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
WINDOWED = {**QWEN2, "use_sliding_window": True}
GEMMA2 = {**RAW, "architectures": ["Gemma2ForCausalLM"]}
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_assumed_defaults_are_those_of_transformers(name):
    from transformers import CONFIG_MAPPING

    theirs = {field.name: field.default for field in fields(CONFIG_MAPPING[name])}
    unlisted = {"sliding_window_pattern"}  # read by Gemma 3's config without being a field of it
    for key, value in FAMILIES[name].defaults.items():
        if value is not None and key not in unlisted:
            assert theirs[key] == value, key


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("head", ["lm", "score"])
def test_names_and_shapes_are_those_of_transformers(saved, name, head):
    model = saved(name, head).model
    kind = "lm" if head == "lm" else "reward"
    config = read_config(model.config.to_dict() | {"architectures": [type(model).__name__]}, "here")
    theirs = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert {n: stored.shape for n, stored in stored_tensors(config, kind).items()} == theirs


def test_every_family_has_variants():
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES)
    assert {VARIANTS[name][0] for name in EACH_FAMILY} == set(FAMILIES)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_layers_see_as_far_as_in_transformers_where_the_config_leaves_it_open(name):
    from transformers import CONFIG_MAPPING

    sizes = {"num_hidden_layers": 14, "use_sliding_window": True, "max_window_layers": 9, "head_dim": 8}
    theirs = CONFIG_MAPPING[name](**sizes)
    raw = {**theirs.to_dict(), **sizes, "layer_types": None}
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 14
    window = getattr(theirs, "sliding_window", None)
    config = read_config(raw, "here")
    expected = [window if kind == "sliding_attention" else None for kind in types]
    assert [config.window(i) for i in range(14)] == expected


def test_gpt2_keys_may_have_their_general_names():
    raw = {
        "model_type": "gpt2",
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 24,
    }
    config = read_config(raw, "here")
    sizes = (config.hidden_size, config.num_layers, config.num_heads, config.max_positions)
    assert sizes == (32, 2, 4, 24)
    assert config.intermediate_size == 128


def test_an_old_gemma_config_means_the_approximation_when_it_says_gelu():
    raw = {**RAW, "architectures": ["GemmaForCausalLM"], "num_key_value_heads": 4, "hidden_act": "gelu"}
    assert read_config(raw, "here").activation == "gelu_pytorch_tanh"


def test_a_config_without_architectures_goes_by_its_model_type():
    raw = {key: value for key, value in RAW.items() if key != "architectures"} | {"model_type": "llama"}
    assert read_config(raw, "here").family == "llama"


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (
            {**RAW, "architectures": ["MambaForCausalLM"]},
            r"here is of an unsupported architecture \(MambaForCausalLM\); supported are LlamaForCausalLM, "
            "LlamaForSequenceClassification, Qwen2ForCausalLM, .*, Gemma3TextForSequenceClassification, "
            r"GPT2LMHeadModel, GPT2ForSequenceClassification\.$",
        ),
        ({"model_type": "mamba"}, "unsupported architecture .model_type 'mamba'."),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
            r"unsupported architecture \(Gemma3ForConditionalGeneration\)",
        ),
        ({**WINDOWED, "layer_types": ["sliding_attention"] * 3}, "layer_types has 3 entries for 2 layers"),
        ({**WINDOWED, "layer_types": ["chunked_attention", "full_attention"]}, "'chunked_attention', but only"),
        ({**WINDOWED, "sliding_window": 0, "max_window_layers": 0}, "sliding_window must be a whole number"),
        (
            {**GEMMA2, "use_bidirectional_attention": True},
            "here sets use_bidirectional_attention, but only causal",
        ),
        ({**GEMMA2, "attn_logit_softcapping": -1.0}, r"attention_softcap must be a number above zero.*-1\.0"),
        ({**GPT2, "add_cross_attention": True}, "here sets add_cross_attention, but there is no second text"),
        ({**GPT2, "n_embd": None}, "here lacks the key 'n_embd'"),
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
