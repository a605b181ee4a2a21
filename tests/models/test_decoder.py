"""The decoder against `transformers`: logits, gradients, scores."""

from itertools import pairwise

import pytest
import torch

from meshift.models.attention import PackedAttention, PlainAttention, packed_positions
from meshift.models.hf.load import load_model

LENGTHS = (5, 17, 1, 0, 9, 30, 16)
VARIANT_NAMES = [
    "llama",
    "llama-mha",
    "llama-tied",
    "llama-biases",
    "llama-wide-heads",
    "llama-gelu",
    "qwen2",
    "qwen2-tied",
    "rope-linear",
    "rope-dynamic",
    "rope-llama3",
    "rope-yarn",
    "rope-longrope",
]
KEPT = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def logits_of(model, tokens, attention=PackedAttention, lengths=LENGTHS, **options):
    hidden = model(tokens, packed_positions(lengths), attention(lengths), **options)
    return model.head(hidden)


def sequences(rows):
    return [part for part in rows.split(LENGTHS) if len(part)]


def test_every_variant_is_tested(variants):
    assert set(VARIANT_NAMES) == set(variants)


@pytest.mark.parametrize("name", VARIANT_NAMES)
def test_packed_logits_are_those_of_each_sequence_alone_in_transformers(saved, tokens, name):
    ours = load_model(saved(name).folder)
    with torch.no_grad():
        packed = logits_of(ours, tokens)
        alone = [saved(name).model(part[None]).logits[0] for part in sequences(tokens)]
    torch.testing.assert_close(packed, torch.cat(alone), **KEPT)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "rope-llama3"])
def test_packed_logits_are_those_of_a_padded_transformers_batch(saved, tokens, name):
    parts = sequences(tokens)
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    with torch.no_grad():
        theirs = saved(name).model(padded, attention_mask=mask).logits[mask.bool()]
        packed = logits_of(load_model(saved(name).folder), tokens)
    torch.testing.assert_close(packed, theirs, **KEPT)


@pytest.mark.parametrize("name", ["llama-tied", "llama-biases", "qwen2", "rope-yarn"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_those_of_transformers(saved, tokens, name, checkpoint):
    from meshift.models.hf.families import hf_name

    reference, ours = saved(name).model, load_model(saved(name).folder)
    reference.zero_grad()
    losses = [_cross_entropy(reference(part[None]).logits[0], part) for part in sequences(tokens)]
    torch.stack(losses).sum().backward()
    rows = sequences(logits_of(ours, tokens, checkpoint=checkpoint))
    pairs = zip(rows, sequences(tokens), strict=True)
    torch.stack([_cross_entropy(row, part) for row, part in pairs]).sum().backward()
    theirs = dict(reference.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        expected = theirs[hf_name(ours.config, "lm", parameter_name)].grad
        torch.testing.assert_close(parameter.grad, expected, atol=2e-4, rtol=1e-3, msg=parameter_name)


def _cross_entropy(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("head", ["reward", "value"])
def test_scores_are_those_of_sequence_classification(saved, tokens, name, head):
    ours = load_model(saved(name, "score").folder, head=head)
    with torch.no_grad():
        scores = logits_of(ours, tokens)
        alone = [saved(name, "score").model(part[None]).logits.squeeze() for part in sequences(tokens)]
    assert scores.shape == (sum(LENGTHS),)
    last_rows = torch.tensor([n for n in LENGTHS if n]).cumsum(0) - 1
    torch.testing.assert_close(scores[last_rows], torch.stack(alone), **KEPT)


def test_plain_attention_gives_the_same_logits(saved, tokens):
    ours = load_model(saved("llama").folder)
    with torch.no_grad():
        plain, packed = (logits_of(ours, tokens, kind) for kind in (PlainAttention, PackedAttention))
    torch.testing.assert_close(plain, packed, atol=1e-5, rtol=0.0)


def test_a_sequence_does_not_depend_on_its_neighbours(saved, tokens):
    ours = load_model(saved("llama").folder)
    changed = tokens.clone()
    changed[:5] = (changed[:5] + 7) % 61
    with torch.no_grad():
        first, second = logits_of(ours, tokens), logits_of(ours, changed)
    assert torch.equal(first[5:], second[5:])
    assert not torch.equal(first[:5], second[:5])


def test_bf16_differs_from_fp32_by_no_more_than_transformers_in_bf16_does(saved, tokens):
    part = tokens[5:22]
    with torch.no_grad():
        exact = saved("llama").model(part[None]).logits[0]
        half = saved("llama").model.__class__.from_pretrained(saved("llama").folder, dtype=torch.bfloat16)
        theirs = half(part[None]).logits[0].float()
        ours = logits_of(load_model(saved("llama").folder, dtype=torch.bfloat16), part, lengths=(17,)).float()
    assert (ours - exact).abs().mean() < 1.25 * (theirs - exact).abs().mean()


def test_training_and_inference_agree_bit_for_bit_in_bf16(saved, tokens):
    ours = load_model(saved("llama").folder, dtype=torch.bfloat16)
    with torch.no_grad():
        inferred = logits_of(ours, tokens)
    assert torch.equal(logits_of(ours, tokens), inferred)
    assert torch.equal(logits_of(ours, tokens, checkpoint=True), inferred)


def test_casting_a_model_keeps_its_rotary_frequencies_in_fp32(saved):
    ours = load_model(saved("rope-llama3").folder)
    before = ours.rotary.inv_freq.clone()
    assert torch.equal(ours.to(torch.bfloat16).rotary.inv_freq, before)


def test_a_tied_head_follows_its_embedding(saved):
    ours = load_model(saved("llama-tied").folder)
    ours.embedding.weight = torch.nn.Parameter(torch.zeros_like(ours.embedding.weight))
    assert not ours.head(torch.ones(1, 32)).any()
    assert "head.weight" not in ours.state_dict()


def test_checkpointing_runs_layers_again_instead_of_keeping_them(saved, tokens):
    ours = load_model(saved("llama").folder)
    kept = [_kept_bytes(ours, tokens, checkpoint) for checkpoint in (False, True)]
    assert kept[1] < kept[0] / 3
    assert all(later > 0 for _, later in pairwise(kept))


def _kept_bytes(model, tokens, checkpoint):
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(tokens, packed_positions(LENGTHS), PackedAttention(LENGTHS), checkpoint=checkpoint)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert hidden.requires_grad
    return sum(size for pointer, size in sizes.items() if pointer not in weights)
