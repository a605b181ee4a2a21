"""Generation with adapters merged into copies of the weights: what training computes, and nothing stale."""

import pytest
import torch
from adapted import adapted_model, adapters_in
from tiny_families import MODELS

from meshift.generation.engine import GenerationEngine
from meshift.generation.fused import FusedDecoder
from meshift.generation.matrices import CopiedMatrix, make_matrix
from meshift.generation.params import SamplingParams
from meshift.generation.plain import generate_plain

PROMPTS = [[3, 1, 4], [9], [8, 2, 60, 5]]
PARAMS = SamplingParams(max_new_tokens=6)


def drawn(found):
    return [completion.tokens for completion in found]


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_completions_would_be_of_another_model_than_is_trained(name, packs, monkeypatch):
    if not packs:  # as on a GPU
        monkeypatch.setattr("meshift.generation.matrices.can_pack", lambda weight: False)
        monkeypatch.setattr("meshift.generation.fused.can_pack", lambda weight: False)
    model = adapted_model(name)
    ours = GenerationEngine(model, num_slots=2).generate(PROMPTS, PARAMS, seed=3)
    theirs = generate_plain(model, PROMPTS, PARAMS, seed=3)
    assert drawn(ours) == drawn(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [True, False])
def test_generation_would_go_on_with_old_adapters_or_change_the_weights_beside_them(packs, dtype, monkeypatch):
    if not packs:
        monkeypatch.setattr("meshift.generation.matrices.can_pack", lambda weight: False)
        monkeypatch.setattr("meshift.generation.fused.can_pack", lambda weight: False)
    model = adapted_model("llama-biases", dtype=dtype)
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = GenerationEngine(model, num_slots=2)
    first = engine.logprobs(PROMPTS)
    adapters = adapters_in(dict(model.named_parameters()))
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.data.mul_(3.0 if name.endswith("lora_b") else 1.0)  # no version is counted
    second = engine.logprobs(PROMPTS)
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) > 0.05
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(held[name])
    assert engine.logprobs(PROMPTS) == first
    assert all(torch.equal(parameter, held[name]) for name, parameter in model.named_parameters())


def test_sums_would_be_rounded_twice():
    model = adapted_model("llama-biases", dtype=torch.bfloat16)
    linear = model.layers[0].attention.query
    a, b = linear.lora_a.double(), linear.lora_b.double()
    exact = linear.weight.double() + 1.5 * b @ a
    merged = linear.merged()
    assert merged.dtype == torch.bfloat16
    assert (merged != exact.to(torch.bfloat16)).float().mean() < 1e-3  # but for ties of the sum in fp32
    twice = (linear.weight + (1.5 * b @ a).to(torch.bfloat16)).to(torch.bfloat16)
    assert (twice != merged).float().mean() > 0.01


def test_copies_of_merged_weights_would_not_be_counted(monkeypatch):
    monkeypatch.setattr("meshift.generation.matrices.can_pack", lambda weight: False)
    monkeypatch.setattr("meshift.generation.fused.can_pack", lambda weight: False)
    model = adapted_model("llama-biases", targets=("attention.query", "mlp.down"))
    layer = model.layers[0]
    assert isinstance(make_matrix([layer.mlp.down]), CopiedMatrix)
    assert make_matrix([layer.mlp.up]).num_bytes == 0
    decoder = FusedDecoder(model)
    decoder.refresh()
    own = layer.attention
    parts = (own.query, own.key, own.value, layer.mlp.down)
    assert decoder.num_bytes == 3 * sum(part.weight.nbytes for part in parts)
    decoder.release()
    assert decoder.num_bytes == 0
