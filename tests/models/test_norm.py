"""Norms against those of `transformers`: rows and heads, values and gradients."""

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from meshift.models.norm import PlusOneRMSNorm, RMSNorm


@pytest.mark.parametrize(("ours", "theirs"), [(RMSNorm, LlamaRMSNorm), (PlusOneRMSNorm, Gemma3RMSNorm)])
@pytest.mark.parametrize("shape", [(7, 16), (5, 3, 16)])
def test_values_and_gradients_of_rows_and_heads_are_those_of_transformers(ours, theirs, shape):
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(shape, generator=generator) for _ in range(2))
    found = []
    for kind in (ours, theirs):
        norm = kind(16, 1e-3)
        assert torch.equal(norm(x), kind(16, eps=1e-3)(x))
        with torch.no_grad():
            norm.weight.add_(torch.linspace(-0.5, 0.5, 16))
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        (out * weights).sum().backward()
        found.append((out, leaf.grad, norm.weight.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_one_plus_the_weight_is_not_rounded_to_bfloat16_on_the_way():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 16, generator=generator).bfloat16()
    ours, theirs = PlusOneRMSNorm(16, 1e-6).bfloat16(), Gemma3RMSNorm(16, 1e-6).bfloat16()
    rounded = RMSNorm(16, 1e-6).bfloat16()
    with torch.no_grad():
        for norm in (ours, theirs):
            norm.weight.copy_(torch.linspace(-0.1, 0.1, 16))
        rounded.weight.copy_(1 + ours.weight)
    torch.testing.assert_close(ours(x), theirs(x), atol=0.0, rtol=2**-8)  # the last bit may go either way
    assert (ours(x) != theirs(x)).float().mean() < 0.01
    assert (rounded(x) != theirs(x)).float().mean() > 0.1
