"""The fused forward pass: against the decoder, with weights that change under it, and row by row."""

import pytest
import torch

from meshift.generation.engine import GenerationEngine
from meshift.generation.fused import FusedDecoder
from meshift.generation.matrices import PackedMatrix, PlainMatrix, can_pack
from meshift.generation.params import SamplingParams
from meshift.generation.session import row_bucket
from meshift.models.attention import PackedAttention, packed_positions

LENGTHS = [7, 1, 12]
packed_only = pytest.mark.skipif(not can_pack(torch.zeros(1)), reason="this machine has no packed kernels")


def inputs(vocab_size=61, lengths=LENGTHS):
    tokens = torch.randint(vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return tokens, packed_positions(lengths), PackedAttention(lengths)


def both(model, fused, **sizes):
    """Logits by the decoder and by the fused pass."""
    with torch.inference_mode():
        fused.refresh()
        expected = model.head(model(*inputs(**sizes)))
        return expected, fused.logits(fused.forward(*inputs(**sizes)))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "features",
    [
        {},
        {"family": "qwen2"},
        {"tied": False},
        {"num_kv_heads": 1},
        {"norm": "rms_plus_one", "norm_places": "both", "embedding_scale": 5.0, "logit_softcap": 3.0},
        {"norm_places": "after", "query_key_norm": "projection"},
        {"query_key_norm": "head", "norm": "layer"},
        {"gated_mlp": False},
    ],
    ids=str,
)
def test_fused_logits_would_differ_from_the_decoders(make_model, monkeypatch, features, plain):
    if plain:
        monkeypatch.setattr("meshift.generation.matrices.can_pack", lambda weight: False)
        monkeypatch.setattr("meshift.generation.fused.can_pack", lambda weight: False)
    model = make_model(**features)
    fused = FusedDecoder(model)
    expected, found = both(model, fused)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert plain == (fused.num_bytes == 0)


CHANGES = {
    "in place": lambda weight: weight.add_(0.1),
    "one row": lambda weight: weight[3].mul_(2),
    "not counted": lambda weight: weight.data.mul_(1.5),
    "two words, their sum unchanged": lambda weight: weight.copy_(weight.flip(0)),
    "another tensor": lambda weight: weight.set_(weight * 2),
}


@pytest.mark.parametrize("name", ["layers.1.mlp.down.weight", "layers.0.attention.key.weight", "embedding.weight"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_would_be_stale_after_a_change(make_model, name, change, dtype):
    model = make_model().to(dtype)
    fused = FusedDecoder(model)
    before = both(model, fused)[1]
    with torch.no_grad():
        CHANGES[change](model.get_parameter(name))
    expected, found = both(model, fused)
    error, change_seen = (float((other - expected).abs().mean()) for other in (found, before))
    assert error < (1e-5 if dtype == torch.float32 else 0.05)
    assert change_seen > 2 * error
    assert change_seen > 1e-3


@packed_only
def test_unchanged_weights_are_packed_once_and_freed_when_asked(make_model, monkeypatch):
    packed = []
    whole = PackedMatrix.__init__

    def counting(self, *parts):
        packed.append(self)
        whole(self, *parts)

    monkeypatch.setattr(PackedMatrix, "__init__", counting)
    model = make_model()
    engine, params = GenerationEngine(model), SamplingParams(max_new_tokens=2)
    assert engine.num_packed_bytes == 0
    for _ in range(3):
        engine.generate([[1, 2]], params, seed=0)
    assert len(packed) == 2 * 5 + 1, "five products a layer, and the head"
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert engine.num_packed_bytes == sum(matrix.nbytes for matrix in matrices)
    engine.release_weights()
    assert engine.num_packed_bytes == 0
    engine.generate([[1, 2]], params, seed=0)
    assert len(packed) == 2 * 11
    engine.release()
    assert engine.num_packed_bytes == engine.num_kept_bytes == 0


@packed_only
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (61, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_rows_would_change_a_rows_bits(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = PackedMatrix([torch.randn(shape, generator=generator).to(dtype)])
    rows, other = (torch.randn(192, n, generator=generator).to(dtype) for n in (shape[1], shape[0]))
    products = (matrix, lambda x: matrix.plus(x, other[: len(x)]), lambda x: matrix.times(x, other[: len(x)]))
    sizes = {row_bucket(n, few=dtype == torch.bfloat16) for n in range(1, 193)}
    assert {8, 64, 136} <= sizes
    for product in products:
        whole = product(rows)
        assert all(product(rows[:n]).equal(whole[:n]) for n in sizes)


def test_every_product_equals_the_plain_one():
    parts = [torch.nn.Linear(24, width) for width in (16, 8, 8)]
    plain = PlainMatrix(parts)
    packed = (
        PackedMatrix([p.weight for p in parts], [p.bias for p in parts]) if can_pack(parts[0].weight) else plain
    )
    rows, other = torch.randn(5, 24), torch.randn(5, 32)
    with torch.inference_mode():
        product = torch.cat([part(rows) for part in parts], dim=1)
        for matrix in (plain, packed):
            torch.testing.assert_close(matrix(rows), product)
            torch.testing.assert_close(matrix.plus(rows, other), product + other)
            torch.testing.assert_close(matrix.times(rows, other), product * other)
            for name in ("silu", "gelu_pytorch_tanh", "relu"):
                function = {"silu": torch.nn.functional.silu, "relu": torch.relu}.get(
                    name, lambda x: torch.nn.functional.gelu(x, approximate="tanh")
                )
                torch.testing.assert_close(matrix(rows, name), function(product))


def test_buckets_hold_their_rows_and_are_few():
    for few in (True, False):
        sizes = [row_bucket(n, few=few) for n in range(1, 129)]
        assert all(size >= n for n, size in enumerate(sizes, start=1))
        assert len(set(sizes)) == (19 if few else 16)
