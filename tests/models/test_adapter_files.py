"""Adapter folders: PEFT's names and settings, read and written; and `peft` itself, where it is installed."""

import json

import pytest
import torch
from adapted import adapt
from family_variants import SIZES, VARIANTS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from meshift.errors import ModelError
from meshift.models.adapters import merged_model
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.hf.adapter_targets import modules_of, targets_of
from meshift.models.hf.load import load_config, load_model, open_weights
from meshift.models.hf.save import save_adapter, save_model

NAMES = ("llama-biases", "qwen3", "phi3", "gpt2", "gemma2")
TOKENS = torch.arange(9) * 7 % 61


def save_base(name, folder, head="lm", dtype=torch.float32):
    """A family's model as `transformers` saves it."""
    family, differs = VARIANTS[name]
    config = AutoConfig.for_model(family, **{**SIZES, **differs})
    torch.manual_seed(0)
    kind = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    if head != "lm":
        config.num_labels = 1
    kind.from_config(config).to(dtype).save_pretrained(folder)
    return folder


def adapted(base, head="lm", modules=None, dtype=None, **options):
    model = load_model(base, head=head, dtype=dtype)
    targets = None if modules is None else targets_of(model.config, modules)
    return adapt(model, targets, made_for=str(base), **options)


@torch.no_grad()
def read(model):
    found = model.head(model(TOKENS, packed_positions([len(TOKENS)]), PackedAttention([len(TOKENS)])))
    return found if model.head_kind == "lm" else found[-1:, None]


def test_names_and_numbers_would_not_be_pefts(tmp_path):
    model = adapted(save_base("llama", tmp_path / "base"), modules=["q_proj", "down_proj"], first_layer=1)
    save_adapter(model, tmp_path / "adapter")
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1"
    assert {name: list(t.shape) for name, t in held.items()} == {
        f"{prefix}.self_attn.q_proj.lora_A.weight": [3, 32],
        f"{prefix}.self_attn.q_proj.lora_B.weight": [32, 3],
        f"{prefix}.mlp.down_proj.lora_A.weight": [3, 48],
        f"{prefix}.mlp.down_proj.lora_B.weight": [32, 3],
    }
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 4.5, "bias": "none"}
    expected |= {"target_modules": ["down_proj", "q_proj"], "layers_to_transform": [1]}
    expected |= {"base_model_name_or_path": str(tmp_path / "base"), "modules_to_save": None}
    assert expected.items() <= settings.items()
    # The formula, on the files alone.
    stored = dict(open_weights(tmp_path / "base").read(["model.layers.1.self_attn.q_proj.weight"]))
    a, b = (held[f"{prefix}.self_attn.q_proj.lora_{side}.weight"] for side in "AB")
    whole = stored["model.layers.1.self_attn.q_proj.weight"] + 4.5 / 3 * b @ a
    merged = load_model(tmp_path / "adapter").layers[1].attention.query.weight
    torch.testing.assert_close(merged.detach(), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["lm", "reward"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_would_come_back_as_another(name, head, dtype, tmp_path):
    model = adapted(save_base(name, tmp_path / "base", head, dtype), head, rank_stabilized=name == "phi3")
    save_adapter(model, tmp_path / "adapter")
    back, merged = load_model(tmp_path / "adapter", head=head), merged_model(model)
    assert back.dtype == dtype
    for (own, theirs), (name_, ours) in zip(back.named_parameters(), merged.named_parameters(), strict=True):
        assert own == name_
        # Both are sums in fp32, rounded once; fused modules add zeros, perhaps in another order.
        room = 1e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(theirs.detach(), ours.detach(), atol=1e-6, rtol=room)
    save_model(merged, tmp_path / "whole")
    torch.testing.assert_close(read(load_model(tmp_path / "whole", head=head)), read(merged))
    assert (
        load_config(tmp_path / "adapter").hf["architectures"]
        == load_config(tmp_path / "whole").hf["architectures"]
    )


@pytest.mark.parametrize("head", ["lm", "reward"])
@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_peft_would_make_another_model_of_an_adapter(name, rank_stabilized, head, tmp_path):
    peft = pytest.importorskip("peft")
    base = save_base(name, tmp_path / "base", head)
    modules = ["c_attn", "mlp.c_proj"] if name == "gpt2" else None
    model = adapted(base, head, modules, first_layer=1, rank_stabilized=rank_stabilized)
    save_adapter(model, tmp_path / "adapter")
    kind = AutoModelForCausalLM if head == "lm" else AutoModelForSequenceClassification
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "adapter").eval()
    found = theirs(input_ids=TOKENS[None]).logits
    torch.testing.assert_close(found[0] if head == "lm" else found, read(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(read(model), read(load_model(base, head=head)), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_pefts_would_be_read_as_another(name, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(save_base(name, tmp_path / "base"))
    modules = sorted({m.rpartition(".")[2] for m in modules_of(load_config(tmp_path / "base")).values()})
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM",
        rank_pattern={modules[0]: 2}, alpha_pattern={modules[-1]: 5},
    )  # fmt: skip
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS[None]).logits[0]
    torch.testing.assert_close(read(load_model(tmp_path / "adapter")), expected, atol=1e-5, rtol=1e-5)


def test_modules_that_lie_together_are_named_together(tmp_path):
    llama, phi, gpt = (load_config(save_base(name, tmp_path / name)) for name in ("llama", "phi3", "gpt2"))
    assert targets_of(llama, ["v_proj", "self_attn.q_proj"]) == ("attention.query", "attention.value")
    assert targets_of(phi, ["qkv_proj"]) == ("attention.query", "attention.key", "attention.value")
    assert targets_of(gpt, ["c_proj"]) == ("attention.output", "mlp.down")
    assert targets_of(gpt, ["mlp.c_proj"]) == ("mlp.down",)
    with pytest.raises(ModelError, match="no linear layer 'q_proj' in its layers; choose of c_attn, c_fc, c_proj"):
        targets_of(gpt, ["q_proj"])


@pytest.fixture
def folder(tmp_path):
    save_adapter(adapted(save_base("llama", tmp_path / "base")), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"use_dora": True}, "sets use_dora, which is not read"),
        ({"peft_type": "IA3"}, "is of no plain LoRA adapter"),
        ({"bias": "all"}, "is of no plain LoRA adapter"),
        ({"base_model_name_or_path": None}, "lacks base_model_name_or_path or lora_alpha"),
        ({"base_model_name_or_path": "/nowhere/base"}, "is an adapter for '/nowhere/base', which cannot be had"),
    ],
)
def test_settings_that_change_the_sum_are_refused(folder, change, sentence):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=sentence):
        load_model(folder)


def without_a_half(held):
    held.pop(next(name for name in held if "lora_B" in name))


def beside_the_embedding(held):
    held["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(2, 2)


def of_other_sizes(held):
    held.update({name: torch.ones(3, 5) for name in held if "q_proj.lora_A" in name})


def of_more_layers(held):
    held.update({name.replace("layers.0", "layers.9"): tensor.clone() for name, tensor in held.items()})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_a_half, "has no counterpart"),
        (beside_the_embedding, "it is not read"),
        (of_other_sizes, "it is for another model"),
        (of_more_layers, "has no counterpart"),
    ],
)
def test_tensors_that_fit_nowhere_are_refused(folder, change, sentence):
    held = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    change(held)
    save_file(held, folder / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=sentence):
        load_model(folder)


def test_a_folder_without_weights_is_named(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no adapter_model\.safetensors"):
        load_model(folder)
