"""Adapters beside linear layers: what they compute, what they learn, and what they leave alone."""

from dataclasses import replace

import pytest
import torch
from adapted import adapt, adapted_model, adapters_in, with_lora
from tiny_families import MODELS, family_model

from meshift.models.adapters import add_adapter, merged_model, without_adapter
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.config import Adapter
from meshift.models.decoder import Decoder
from meshift.models.linear import Linear
from meshift.models.shards import shard_table
from meshift.training.optimizer import freeze

TOKENS, LENGTHS = torch.arange(11) * 5 % 61, [4, 7]
SCALE = 1.5


def outputs(model):
    return model.head(model(TOKENS, packed_positions(LENGTHS), PackedAttention(LENGTHS)))


def dense_twin(model):
    """The same function as a model without adapters, each matrix summed up by loops over the ranks."""
    twin = Decoder(replace(model.config, adapter=None), model.head_kind)
    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            whole, module = weights[name].clone(), name.removesuffix(".weight")
            if f"{module}.lora_a" in weights:
                a, b = weights[f"{module}.lora_a"], weights[f"{module}.lora_b"]
                for row in range(len(a)):
                    whole += SCALE * torch.outer(b[:, row], a[row])
            parameter.copy_(whole)
    return twin


@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_would_compute_something_else_than_with_its_sums(name, head):
    model = adapted_model(name, head)
    twin = dense_twin(model)
    torch.testing.assert_close(outputs(model), outputs(twin), atol=1e-4, rtol=1e-4)
    merged = merged_model(model)
    for own, parameter in merged.named_parameters():
        torch.testing.assert_close(parameter, dict(twin.named_parameters())[own], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(outputs(model), outputs(family_model(name, head)), atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_new_adapter_would_change_the_model(name, dtype):
    model = family_model(name, dtype=dtype)
    before = outputs(model)
    add_adapter(model, Adapter(rank=2, alpha=4.0, targets=model.config.linear_names), seed=3)
    torch.testing.assert_close(outputs(model), before, atol=0 if dtype == torch.float32 else 0.1, rtol=0)
    for own, parameter in adapters_in(dict(model.named_parameters())).items():
        if own.endswith("lora_b"):
            assert not parameter.any()
        else:
            bound = parameter.shape[1] ** -0.5
            assert 0.8 * bound < parameter.abs().max() <= bound * 1.01
    again = add_adapter(family_model(name, dtype=dtype), model.config.adapter, seed=3)
    other = add_adapter(family_model(name, dtype=dtype), model.config.adapter, seed=4)
    pairs = [adapters_in(dict(one.named_parameters())) for one in (model, again, other)]
    key = next(iter(pairs[0]))
    assert all(torch.equal(pairs[0][n], p) for n, p in pairs[1].items())
    assert not torch.equal(pairs[0][key], pairs[2][key])


@pytest.mark.parametrize("name", ["llama-biases", "olmo2", "gpt2", "phi3"])
def test_gradients_would_not_be_those_of_the_sum(name):
    """With G the gradient of the summed matrix: that of A is scale B' G, that of B is scale G A'."""
    model = adapted_model(name)
    twin = dense_twin(model)
    outputs(twin).square().sum().backward()
    freeze(model, with_lora())
    outputs(model).square().sum().backward()
    of_sum = {n: p.grad for n, p in twin.named_parameters()}
    parameters = dict(model.named_parameters())
    assert not any(p.grad is not None for n, p in parameters.items() if n not in adapters_in(parameters))
    for module, linear in model.named_modules():
        if isinstance(linear, Linear):
            whole = of_sum[f"{module}.weight"]
            expected = {"lora_a": SCALE * linear.lora_b.T @ whole, "lora_b": SCALE * whole @ linear.lora_a.T}
            for own, gradient in expected.items():
                found = getattr(linear, own).grad
                error = (found - gradient).norm() / gradient.norm()
                assert error < 1e-4, (module, own, error)


@pytest.mark.parametrize("targets", [None, ("attention.query", "mlp.down")])
@pytest.mark.parametrize("name", MODELS)
def test_the_shard_table_would_be_of_another_model(name, targets):
    for head in ("lm", "value"):
        model = adapt(family_model(name, head), targets, first_layer=1)
        table = shard_table(model.config, head)
        assert [(n, s.shape) for n, s in table.items()] == [
            (n, tuple(p.shape)) for n, p in model.named_parameters()
        ]
        with torch.device("meta"):
            built = Decoder(model.config, head)
        assert [n for n, _ in built.named_parameters()] == list(table)
        count = 2 * 2 * len(targets or model.config.linear_names)  # A and B, in two of three layers
        assert len(adapters_in(table)) == count


def test_the_model_beside_which_adapters_stand_would_be_a_copy():
    model = adapted_model("llama-tied", dtype=torch.bfloat16)
    bare, alone = without_adapter(model), family_model("llama-tied", dtype=torch.bfloat16)
    own = dict(model.named_parameters())
    assert all(parameter is own[name] for name, parameter in bare.named_parameters())
    assert bare.config.adapter is None
    assert torch.equal(outputs(bare), outputs(alone))


def test_adapters_would_take_more_than_a_score_head_into_training():
    for head, rest in (("lm", set()), ("value", {"head.weight"})):
        model = adapted_model("llama-biases", head)
        freeze(model, with_lora())
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained - adapters_in(dict.fromkeys(trained)).keys() == rest
