"""A model cut over tensor ranks is the whole one: rows, log-probs, every gradient, and the tokens it samples."""

import pytest
import torch
from gang import run_gang
from tiny_families import MODELS, family_model

from meshift.errors import LayoutError
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.shards import shard_table
from meshift.parallel.exchange import gather_facts
from meshift.parallel.groups import join
from meshift.parallel.tensor import add_shared, cut_model, shared_parameters
from meshift.training.token_logprobs import Wanted, plain_token_logprobs, token_logprobs

LENGTHS = [7, 1, 12]
VOCAB = 61


def place_of(rank, num_ranks):
    devices = [Device(index=i) for i in range(num_ranks)]
    placement = Placement.parse(f"0-{num_ranks - 1}", f"t{num_ranks}")
    return join(placement, devices[rank], {device: i for i, device in enumerate(devices)})


def forbid_some(start, stop, logits):
    rows = torch.arange(start, stop)[:, None]
    return (rows + torch.arange(logits.shape[1])) % 3 == 0


def run(model, read, checkpoint=False):
    """Rows, what is read of them, and gradients by name."""
    tokens = torch.arange(sum(LENGTHS)) * 17 % VOCAB
    hidden = model(tokens, packed_positions(LENGTHS), PackedAttention(LENGTHS), checkpoint=checkpoint)
    found = read(model.head, hidden)
    (found[0] * torch.linspace(-1, 2, len(found[0]))).sum().backward()
    return hidden.detach(), [x.detach() for x in found], {n: p.grad for n, p in model.named_parameters()}


def by_logits(head, hidden):
    return [head(hidden).square().sum(-1)]


def targets():
    rows = torch.arange(sum(LENGTHS))
    wanted = rows * 5 % (VOCAB - 1)
    return torch.where((rows + wanted) % 3 == 0, wanted + 1, wanted)  # nothing that is forbidden


def in_blocks(head, hidden):
    wanted = Wanted(temperature=0.7, forbid=forbid_some, entropy=True, likeliest=True)
    return list(token_logprobs(head, hidden, targets(), 6, wanted))


def plainly(head, hidden):
    wanted = Wanted(temperature=0.7, entropy=True, entropy_gradient=True)
    return list(plain_token_logprobs(head, hidden, targets(), 6, wanted))


READINGS = {"logits": (by_logits, False), "blocks": (in_blocks, True), "plain": (plainly, False)}


def assert_close(ours, theirs, what, scale=1.0):
    """Within 1e-5 of the largest number there is, or of `scale`, where that is larger."""
    difference, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    assert difference < 1e-5 * max(scale, size), f"{what}: {difference:.2e} apart at a size of {size:.2e}"


def summed_gradients(model, place):
    """A rank's gradients, those of what several ranks hold added up."""
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, shared in shared_parameters(model, place.tensor).items():
        add_shared(gradients[name], shared, place.tensor)
    return gradients


def check_reading(name, head, place, read, checkpoint):
    whole, cut = family_model(name, head), cut_model(family_model(name, head), place.tensor)
    rows, found, gradients = run(whole, read)
    our_rows, our_found, _ = run(cut, read, checkpoint)
    assert_close(our_rows, rows, f"{name} rows")
    for ours, theirs in zip(our_found, found, strict=True):
        assert_close(ours, theirs, f"{name} {read.__name__}")
    table = shard_table(whole.config, head)
    scale = 0.1 * max(float(gradient.abs().max()) for gradient in gradients.values())
    for parameter, ours in summed_gradients(cut, place).items():
        theirs, split = gradients[parameter], table[parameter].split
        if split is not None:
            start, stop = split.bounds(place.tensor.index, len(place.tensor))
            theirs = theirs.narrow(split.dim, start, stop - start)
        assert_close(ours, theirs, f"{name} {read.__name__} gradient of {parameter}", scale)


def check_all(rank, num_ranks):
    place = place_of(rank, num_ranks)
    for name in MODELS:
        for read, checkpoint in READINGS.values():
            check_reading(name, "lm", place, read, checkpoint)
    check_reading("olmo2", "value", place, lambda head, hidden: [head(hidden)], False)


def completions(model, dtype):
    params = SamplingParams(max_new_tokens=9, temperature=0.9, top_k=20)
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    engine = GenerationEngine(model.to(dtype), num_slots=4)
    return engine.generate(prompts, params, seed=3, num_generations=2)


def check_generation(rank, num_ranks):
    place = place_of(rank, num_ranks)
    for name in MODELS:
        whole = completions(family_model(name), torch.float32)
        ours = completions(cut_model(family_model(name), place.tensor), torch.float32)
        for one, other in zip(ours, whole, strict=True):
            assert one.tokens == other.tokens, name
            assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), name)
        rounded = completions(cut_model(family_model(name), place.tensor), torch.bfloat16)
        everyone = gather_facts([one.tokens for one in rounded], place.tensor)
        assert all(tokens == everyone[0] for tokens in everyone), f"{name}: ranks sampled different tokens"


@pytest.mark.parametrize("num_ranks", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_a_cut_model_reads_and_learns_as_the_whole_one(num_ranks, tmp_path):
    run_gang(num_ranks, check_all, tmp_path, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_cut_model_samples_the_tokens_of_the_whole_one(num_ranks, tmp_path):
    run_gang(num_ranks, check_generation, tmp_path, num_ranks)


def check_refusal(rank):
    with pytest.raises(LayoutError, match="6 query heads cannot be cut into 7 parts"):
        cut_model(family_model("llama-biases"), place_of(rank, 7).tensor)


def test_more_ranks_than_heads_are_refused(tmp_path):
    run_gang(7, check_refusal, tmp_path)
