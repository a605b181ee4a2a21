"""Folders in: single and sharded files, heads that are there or not, and what is wrong with a folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meshift.errors import ModelError
from meshift.models.hf.load import load_model, load_tokenizer, resolve_model


@pytest.fixture
def edited(saved, tmp_path):
    """`edited(variant, kind, change_tensors, **config)` -> a changed copy of a saved folder."""

    def edit(name, kind="lm", change=None, **config):
        folder = tmp_path / f"{name}-{kind}"
        shutil.copytree(saved(name, kind).folder, folder)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | config))
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors")
        return folder

    return edit


def stored(saved, name, kind="lm"):
    return load_file(saved(name, kind).folder / "model.safetensors")


def test_a_sharded_folder_loads_as_the_single_file_does(saved, tmp_path):
    saved("llama").model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, sharded = load_model(saved("llama").folder), load_model(tmp_path)
    for (name, one), (_, other) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_weights_are_as_stored_unless_a_dtype_is_asked_for(saved, tmp_path, dtype):
    saved("llama").model.__class__.from_pretrained(saved("llama").folder, dtype=torch.bfloat16).save_pretrained(
        tmp_path
    )
    model = load_model(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}


def test_a_file_of_several_dtypes_loads_in_the_embeddings(edited):
    def change(tensors):
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()

    model = load_model(edited("llama", change=change))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_overwriting_the_file_does_not_change_a_loaded_model(edited):
    folder = edited("llama")
    model = load_model(folder)
    before = model.norm.weight.clone()
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * size)
    assert torch.equal(model.norm.weight, before)


def in_a_file(tensor):
    """Whether its memory is that of a mapped file of weights."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return line.endswith(".safetensors")
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_a_model_to_be_cut_would_be_copied_into_memory_whole(saved, name):
    folder = saved(name).folder
    mapped, usual = load_model(folder, mapped=True), load_model(folder)
    assert all(in_a_file(parameter) for parameter in mapped.parameters())
    assert not any(in_a_file(parameter) for parameter in usual.parameters())
    for (own, one), (_, other) in zip(mapped.named_parameters(), usual.named_parameters(), strict=True):
        assert torch.equal(one, other), own
    narrowed = load_model(folder, dtype=torch.bfloat16, mapped=True)
    assert {parameter.dtype for parameter in narrowed.parameters()} == {torch.bfloat16}


def test_a_language_model_starts_a_critic_at_zero(saved):
    assert not load_model(saved("llama").folder, head="value").head.weight.any()


def test_a_fresh_reward_head_is_drawn_from_the_seed(saved):
    first, again, other = (load_model(saved("llama").folder, head="reward", seed=s).head.weight for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # 32 draws with std 1 / sqrt(33): their root mean square is within 50 % of it but for one seed in 10,000.
    assert 0.5 < first.square().mean().sqrt() * 33**0.5 < 1.5


@pytest.mark.parametrize("head", ["value", "reward"])
def test_a_scalar_head_in_the_checkpoint_is_loaded(saved, head):
    ours = load_model(saved("llama", "score").folder, head=head)
    assert torch.equal(ours.head.weight, stored(saved, "llama", "score")["score.weight"])


def test_a_tied_reward_model_can_be_loaded_as_a_language_model(saved):
    ours = load_model(saved("llama-tied", "score").folder)
    expected = stored(saved, "llama-tied", "score")["model.embed_tokens.weight"]
    assert torch.equal(ours.head(torch.eye(32)).T, expected)


def test_old_rotary_buffers_in_a_file_are_passed_over(edited):
    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    load_model(edited("llama", change=change))


def test_gpt2_as_it_was_published_without_prefix_and_with_its_masks_loads(saved, edited):
    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    bare, whole = load_model(edited("gpt2", change=change)), load_model(saved("gpt2").folder)
    for (name, one), (_, other) in zip(bare.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_fused_tensor_of_the_wrong_size_is_named_as_it_is_stored(edited):
    with pytest.raises(ModelError, match=r"qkv_proj.weight is \[64, 31\], but .* \[64, 32\]"):
        load_model(edited("phi3", "lm", _put("model.layers.1.self_attn.qkv_proj.weight", 64, 31)))


def test_a_tied_file_may_repeat_the_embedding_but_not_contradict_it(edited):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    load_model(edited("llama-tied", change=repeat))

    def contradict(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    with pytest.raises(ModelError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(edited("qwen2-tied", change=contradict))


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _put(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("name", "kind", "change", "head", "sentence"),
    [
        ("llama", "lm", _drop("model.norm.weight"), "lm", "lacks the tensor model.norm.weight, which its"),
        ("llama", "lm", _put("model.extra", 1), "lm", "holds the tensor model.extra, which its"),
        ("llama", "lm", _put("model.norm.weight", 31), "lm", r"model.norm.weight is \[31\], but .* \[32\]"),
        ("llama", "score", None, "lm", "no lm_head.weight.*no language model"),
        ("llama", "score", _drop("score.weight"), "reward", "lacks the tensor score.weight"),
        ("llama", "score", _put("score.weight", 3, 32), "value", r"score.weight is \[3, 32\], but .* \[1, 32\]"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(edited, name, kind, change, head, sentence):
    with pytest.raises(ModelError, match=sentence):
        load_model(edited(name, kind, change), head=head)


def test_several_missing_tensors_are_counted_in_one_sentence(edited):
    with pytest.raises(ModelError, match=r"layers\.2\.input_layernorm\.weight \(and 8 more\)"):
        load_model(edited("llama", num_hidden_layers=3))


def test_an_unsupported_activation_is_named(edited):
    with pytest.raises(ModelError, match=r"activation 'mish' .* choose one of silu"):
        load_model(edited("llama", hidden_act="mish"))


def test_a_torn_file_is_named(edited):
    folder = edited("llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is torn or no safetensors file"):
        load_model(folder)


def test_a_missing_shard_is_named(saved, tmp_path):
    saved("llama").model.save_pretrained(tmp_path, max_shard_size="20KB")
    lost = min(tmp_path.glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(ModelError, match=f"{lost.name} is missing, though"):
        load_model(tmp_path)


def test_an_index_without_a_map_is_refused(edited):
    folder = edited("llama")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="lacks the key 'weight_map'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "sentence"), [("{", "cannot be read as JSON"), ("[]", "must hold a JSON object, not a list")]
)
def test_a_broken_config_is_named(edited, content, sentence):
    folder = edited("llama")
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=f"config.json {sentence}"):
        load_model(folder)


def test_pickled_weights_are_refused_with_the_way_out(edited):
    folder = edited("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights.*save_pretrained"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="there are no weights to load"):
        load_model(folder)


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load_model(tmp_path)


def test_a_local_folder_is_used_before_the_hub_is_asked(tmp_path, monkeypatch):
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("org/model").resolve() == tmp_path / "org" / "model"


def test_a_file_is_no_model_folder(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file; give the folder"):
        resolve_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["nobody/nothing", "/no/such/folder"])
def test_a_name_that_cannot_be_fetched_says_what_to_do(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=f"'{name}' is no local folder .* give a local folder"):
        resolve_model(name)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)
