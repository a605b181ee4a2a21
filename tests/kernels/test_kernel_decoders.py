"""Whole tiny models in bfloat16 with kernels and without: neither is further from fp32 than the other."""

import copy
import dataclasses

import pytest
import torch
from adapted import adapt
from threads import num_threads

from meshift.config.sections import TrainableConfig
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.decoder import Decoder
from meshift.models.hf.families import FAMILIES, read_config
from meshift.training.optimizer import MasterAdamW
from meshift.training.token_logprobs import Wanted, token_logprobs

VOCAB = 62
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
LOCAL = {"layer_types": ["sliding_attention", "full_attention"]}
HALF = {"rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}}
# name -> (family, what differs from SIZES)
MODELS = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 6}),
    "olmo2": ("olmo2", {}),
    "phi3": ("phi3", {**HALF, "head_dim": None, "hidden_size": 128, "num_attention_heads": 2}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"sliding_window": 6, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 9}),
    "gemma3": ("gemma3_text", {"sliding_window": 6, "query_pre_attn_scalar": 9, **LOCAL}),
    "gpt2": ("gpt2", {"num_key_value_heads": None, "head_dim": None, "hidden_size": 128}),
}
ODD = {"vocab_size": 61, "intermediate_size": 95, "head_dim": 24}
PARTS = ("product", "add_weight_gradients")
NORMS, GATED = ("rms_norm", "rms_norm_backward"), ("gated_product", "gate_backward")
ATTENTION, LOGPROBS = ("packed_attention", "packed_attention_backward"), ("logprobs", "logprob_gradients")
# name -> kernels that training must have met
MET = {
    **dict.fromkeys(MODELS, (*PARTS, *NORMS, *GATED, *ATTENTION, *LOGPROBS)),
    "gemma2": (*PARTS, *NORMS, *GATED),
    "gpt2": (*PARTS, *ATTENTION, *LOGPROBS),
}
NOT_TURNED = ("qwen3", "olmo2", "gemma3", "gpt2")
"""Where queries are normed before they are turned, in training the decoder turns them; GPT-2 turns nothing."""
LENGTHS = [9, 1, 70, 0, 20]


def tiny(name, **changes) -> Decoder:
    """In bfloat16, with weights large enough for uneven distributions, and other biases and norms than 0 and 1."""
    family, differs = MODELS[name]
    raw = {"model_type": family, "architectures": [FAMILIES[family].causal], **SIZES, **differs, **changes}
    raw = {key: value for key, value in raw.items() if value is not None or key.endswith("token_id")}
    model = Decoder(read_config(raw, "a test")).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw) * (0.15 if parameter.dim() > 1 else 0.1)
            is_norm = parameter.dim() == 1 and not key.endswith("bias")
            one = is_norm and model.config.norm != "rms_plus_one"
            parameter.copy_(noise + 1 if one else noise)
    return model.bfloat16()


@dataclasses.dataclass
class Read:
    """What training sees of a model."""

    hidden: torch.Tensor
    logprobs: torch.Tensor
    gradients: list[torch.Tensor]


def read(model, *, checkpoint=False) -> Read:
    num_rows = sum(LENGTHS)
    draw = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(model.config.vocab_size, (2, num_rows), generator=draw)
    weights = torch.randn(num_rows, generator=draw)
    hidden = model(tokens, packed_positions(LENGTHS), PackedAttention(LENGTHS), checkpoint=checkpoint)
    found = token_logprobs(model.head, hidden, targets, 40, Wanted(temperature=0.9)).logprobs
    gradients = torch.autograd.grad((found * weights).sum() / num_rows, list(model.parameters()))
    return Read(hidden.detach().float(), found.detach(), [part.float() for part in gradients])


def off(found, truth):
    """The size of what differs, as a part of the size of what is right."""
    return float((found - truth).norm() / truth.norm().clamp(min=1e-6))


def hold(name, model, ours, plain, truth):
    assert off(ours.hidden, truth.hidden) <= 1.2 * off(plain.hidden, truth.hidden) + 1e-3
    assert off(ours.hidden, truth.hidden) < 0.02
    differs = [(one.logprobs - truth.logprobs).abs().mean() for one in (ours, plain)]
    assert differs[0] <= 1.2 * differs[1] + 1e-3
    for (key, _), one, other, true in zip(
        model.named_parameters(), ours.gradients, plain.gradients, truth.gradients, strict=True
    ):
        if true.norm() < 1e-4:  # a key's bias moves nothing
            continue
        assert off(one, true) <= 1.5 * off(other, true) + 2e-3, (name, key)
        assert off(one, true) < 0.1, (name, key)


@pytest.mark.parametrize("name", MODELS)
def test_a_family_would_train_otherwise_with_kernels_than_without(multiplies, switch_off, count_calls, name):
    model = tiny(name)
    calls = count_calls()
    ours = read(model)
    assert set(MET[name]) <= set(calls), "the kernels would not have been used"
    assert ("turn" in calls) == (name not in NOT_TURNED)
    truth = read(copy.deepcopy(model).float())
    calls.clear()
    switch_off()
    plain = read(model)
    assert not calls
    hold(name, model, ours, plain, truth)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_would_train_otherwise_with_kernels_than_without(multiplies, switch_off, count_calls, name):
    model = adapt(tiny(name), rank=4)
    calls = count_calls()
    ours = read(model)
    met = set(MET[name]) - {"gated_product"}
    assert met <= set(calls), "the kernels would not have been used"
    truth = read(copy.deepcopy(model).float())
    switch_off()
    hold(name, model, ours, read(model), truth)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3"])
def test_recomputed_layers_would_give_other_gradients(cpu, name):
    model = tiny(name)
    kept, recomputed = read(model), read(model, checkpoint=True)
    assert kept.hidden.equal(recomputed.hidden)
    for one, other in zip(kept.gradients, recomputed.gradients, strict=True):
        assert one.equal(other)


def test_log_probs_without_gradients_would_differ_in_their_bits(cpu):
    model = tiny("llama")
    with torch.no_grad():
        tokens, targets = torch.randint(VOCAB, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
        hidden = model(tokens, packed_positions(LENGTHS), PackedAttention(LENGTHS))
        bare = token_logprobs(model.head, hidden, targets, 40, Wanted(temperature=0.9)).logprobs
    found = read(model)
    assert hidden.float().equal(found.hidden)
    assert bare.equal(found.logprobs)


@pytest.mark.parametrize("sizes", [{"vocab_size": 61}, {"intermediate_size": 95}, {"head_dim": 24}, ODD], ids=str)
def test_sizes_that_kernels_do_not_serve_would_be_given_to_them(cpu, switch_off, sizes):
    model = tiny("llama", **sizes)
    ours, truth = read(model), read(copy.deepcopy(model).float())
    (completion,) = generate(model, num=1)
    assert abs_error(model, completion).mean() < 0.05
    switch_off()
    hold(str(sizes), model, ours, read(model), truth)


PROMPT = [3, 1, 4, 1, 5, 9]
PARAMS = SamplingParams(max_new_tokens=40)


def generate(model, num=6):
    return GenerationEngine(model, num_slots=4).generate([PROMPT], PARAMS, seed=0, num_generations=num)


def abs_error(model, completion):
    """Of what the engine says of its tokens, beside an fp32 copy that reads them all at once."""
    wide = copy.deepcopy(model).float()
    tokens = torch.tensor([*PROMPT, *completion.tokens])
    with torch.no_grad():
        hidden = wide(tokens, packed_positions([len(tokens)]), PackedAttention([len(tokens)]))
        table = torch.log_softmax(wide.head(hidden).float(), -1)
    expected = table[len(PROMPT) - 1 : -1].gather(1, tokens[len(PROMPT) :, None])[:, 0]
    return (torch.tensor(completion.logprobs) - expected).abs()


@pytest.mark.parametrize("name", MODELS)
def test_a_family_would_generate_otherwise_with_kernels_than_without(cpu, switch_off, count_calls, name):
    model = tiny(name)
    calls = count_calls()
    ours = generate(model)
    assert calls
    calls.clear()
    switch_off()
    plain = generate(model)
    assert not calls
    errors = [torch.cat([abs_error(model, one) for one in found]).mean() for found in (ours, plain)]
    assert errors[0] <= 1.2 * errors[1] + 2e-3
    assert errors[0] < 0.08


WHOLE = ("llama", "llama-biases", "qwen2", "mistral", "phi3", "gemma")
"""Those whose decode steps are one call."""


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_in_one_call_would_give_other_bits_than_layer_by_layer(
    multiplies, monkeypatch, count_calls, name
):
    model, calls = tiny(name), count_calls()
    whole = generate(model)
    assert ("decode" in calls) == (name in WHOLE)
    calls.clear()
    monkeypatch.setattr("meshift.generation.fused.whole_step", lambda *given: None)
    by_layer = generate(model)
    assert "decode" not in calls
    assert ("attend" in calls) == (name != "gemma2")
    for one, other in zip(whole, by_layer, strict=True):
        assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "qwen2", "mistral"])
def test_a_completion_would_depend_on_the_threads_or_on_its_company(multiplies, name, threads):
    model = tiny(name)
    together = generate(model)
    with num_threads(threads):
        alone = GenerationEngine(model, num_slots=1).generate([PROMPT], PARAMS, seed=0, first_index=2)
    assert alone[0].tokens == together[2].tokens
    assert alone[0].logprobs == together[2].logprobs


def test_updates_would_end_elsewhere_with_kernels_than_without(cpu, switch_off):
    def train():
        model = tiny("llama-biases")
        optimizer = MasterAdamW(model, TrainableConfig())
        tokens, targets = torch.randint(VOCAB, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
        losses = []
        for _ in range(6):
            hidden = model(tokens, packed_positions(LENGTHS), PackedAttention(LENGTHS))
            loss = -token_logprobs(model.head, hidden, targets, 40, Wanted()).logprobs.mean()
            loss.backward()
            assert all(parameter.grad is None for parameter in model.parameters())
            optimizer.step(1e-2)
            losses.append(loss.item())
        return losses

    ours = train()
    switch_off()
    plain = train()
    assert ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(plain, rel=0.02)
