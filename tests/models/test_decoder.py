"""The decoder against `transformers`: logits, gradients, scores."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from family_variants import EACH_FAMILY, VARIANTS

from meshift.models.attention import PackedAttention, PlainAttention, packed_positions
from meshift.models.decoder import Decoder
from meshift.models.hf.load import load_model
from meshift.models.hf.stored import stored_tensors
from meshift.training.optimizer import is_frozen

LENGTHS = (5, 17, 1, 0, 9, 30, 16)
KEPT = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def logits_of(model, tokens, attention=PackedAttention, lengths=LENGTHS, **options):
    hidden = model(tokens, packed_positions(lengths), attention(lengths), **options)
    return model.head(hidden)


def sequences(rows):
    return [part for part in rows.split(LENGTHS) if len(part)]


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_logits_are_those_of_each_sequence_alone_in_transformers(saved, tokens, name):
    ours = load_model(saved(name).folder)
    with torch.no_grad():
        packed = logits_of(ours, tokens)
        alone = [saved(name).model(part[None]).logits[0] for part in sequences(tokens)]
    torch.testing.assert_close(packed, torch.cat(alone), **KEPT)


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "rope-llama3", "gemma2", "gemma3", "gpt2"])
def test_packed_logits_are_those_of_a_padded_transformers_batch(saved, tokens, name):
    parts = sequences(tokens)
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    with torch.no_grad():
        theirs = saved(name).model(padded, attention_mask=mask).logits[mask.bool()]
        packed = logits_of(load_model(saved(name).folder), tokens)
    torch.testing.assert_close(packed, theirs, **KEPT)


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        *((name, False) for name in (*EACH_FAMILY, "llama-tied", "qwen2", "rope-yarn", "phi3-longrope")),
        ("llama-tied", True),
        ("gemma2", True),
        ("gpt2", True),
    ],
)
def test_gradients_are_those_of_transformers(saved, tokens, name, checkpoint):
    reference, ours = saved(name).model, load_model(saved(name).folder)
    reference.zero_grad()
    losses = [_cross_entropy(reference(part[None]).logits[0], part) for part in sequences(tokens)]
    torch.stack(losses).sum().backward()
    rows = sequences(logits_of(ours, tokens, checkpoint=checkpoint))
    pairs = zip(rows, sequences(tokens), strict=True)
    torch.stack([_cross_entropy(row, part) for row, part in pairs]).sum().backward()
    theirs, parameters = dict(reference.named_parameters()), dict(ours.named_parameters())
    for their_name, stored in stored_tensors(ours.config, "lm").items():
        for our_name, expected in stored.split(theirs[their_name].grad).items():
            found = parameters.pop(our_name).grad
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3, msg=our_name)
    assert not parameters


def _cross_entropy(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum")


@pytest.mark.parametrize(
    ("name", "head"),
    [*((name, "reward") for name in (*EACH_FAMILY, "llama-tied", "qwen2")), ("llama", "value"), ("gpt2", "value")],
)
def test_scores_are_those_of_sequence_classification(saved, tokens, name, head):
    ours = load_model(saved(name, "score").folder, head=head)
    with torch.no_grad():
        scores = logits_of(ours, tokens)
        alone = [saved(name, "score").model(part[None]).logits.squeeze() for part in sequences(tokens)]
    assert scores.shape == (sum(LENGTHS),)
    last_rows = torch.tensor([n for n in LENGTHS if n]).cumsum(0) - 1
    torch.testing.assert_close(scores[last_rows], torch.stack(alone), **KEPT)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {"windows": ()}),
        ("mistral", {"windows": (7, 7)}),
        ("qwen2-window", {"windows": (5, None)}),
        ("phi3-partial", {"windows": ()}),
        ("phi3-partial", {"partial_rotary": False}),
        ("gemma", {"embedding_scale": None}),
        ("gemma2", {"windows": (None, 6)}),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"query_scale": None}),
        ("gemma3", {"rotary_types": ("full_attention", "sliding_attention")}),
        ("gpt2-unscaled", {"query_scale": None}),
    ],
)
def test_what_a_variant_switches_on_shows_in_its_logits(saved, tokens, name, changes):
    """Else the comparisons of logits could not fail."""
    ours = load_model(saved(name).folder)
    other = Decoder(replace(ours.config, **changes))
    other.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert (logits_of(ours, tokens) - logits_of(other, tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_plain_attention_gives_the_same_logits(saved, tokens, name):
    ours = load_model(saved(name).folder)
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


@pytest.mark.parametrize("name", EACH_FAMILY)
def test_bf16_differs_from_fp32_by_no_more_than_transformers_in_bf16_does(saved, tokens, name):
    part, folder = tokens[5:22], saved(name).folder
    with torch.no_grad():
        exact = saved(name).model(part[None]).logits[0]
        half = saved(name).model.__class__.from_pretrained(folder, dtype=torch.bfloat16)
        theirs = half(part[None]).logits[0].float()
        ours = logits_of(load_model(folder, dtype=torch.bfloat16), part, lengths=(17,)).float()
    assert (ours - exact).abs().mean() < 1.25 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2"])
def test_training_and_inference_agree_bit_for_bit_in_bf16(saved, tokens, name):
    ours = load_model(saved(name).folder, dtype=torch.bfloat16)
    with torch.no_grad():
        inferred = logits_of(ours, tokens)
    assert torch.equal(logits_of(ours, tokens), inferred)
    assert torch.equal(logits_of(ours, tokens, checkpoint=True), inferred)


def test_casting_a_model_keeps_its_rotary_frequencies_in_fp32(saved):
    ours = load_model(saved("rope-llama3").folder)
    before = ours.rotaries[0].inv_freq.clone()
    assert torch.equal(ours.to(torch.bfloat16).rotaries[0].inv_freq, before)


def test_a_tied_head_follows_its_embedding(saved):
    ours = load_model(saved("llama-tied").folder)
    ours.embedding.weight = torch.nn.Parameter(torch.zeros_like(ours.embedding.weight))
    assert not ours.head(torch.ones(1, 32)).any()
    assert "head.weight" not in ours.state_dict()


def test_learned_positions_are_frozen_with_the_embedding(saved):
    names = [name for name, _ in load_model(saved("gpt2").folder).named_parameters()]
    expected = [name for name in names if name.startswith(("embedding.", "layers.0."))]
    assert "embedding.position.weight" in expected
    assert [name for name in names if is_frozen(name, 1)] == expected


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
