"""Common beginnings run once: which are found, how they are laid out, and that nothing but time depends on it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import num_threads
from tiny_families import MODELS, family_model
from tiny_rl import tiny_model
from twins import relative_difference

from meshift.algorithms.losses import DPOLoss, PairwiseLoss, PolicyLoss, ValueLoss
from meshift.batch import Batch, Ragged, micro_batches
from meshift.config.sections import TrainableConfig
from meshift.kernels.cpu import products_for
from meshift.models.attention import packed_positions
from meshift.training import prefixes
from meshift.training.engine import TrainingEngine
from meshift.training.prefixes import Family, arrange, families, share_in_micro_batches
from meshift.training.readings import SequenceScores, TokenLogprobs, TokenValues
from meshift.training.text_readings import PairLogprobs, PairScores

TEXTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=5)


@pytest.fixture
def short(monkeypatch):
    """Two tokens in common are already worth it."""
    monkeypatch.setattr(prefixes, "MIN_SHARED", 2)


def draws(*shape, seed=0, vocab_size=13):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def groups(sizes, *, prompt=9, seed=0):
    """Rollouts: so many completions of each prompt, of 0 to 6 tokens more than one."""
    rows, lengths = [], []
    for number, size in enumerate(sizes):
        start = draws(prompt + number, seed=seed + 100 * number)
        for i in range(size):
            lengths.append(1 + (3 * number + 5 * i) % 7)
            rows.append(torch.cat([start, draws(lengths[-1], seed=seed + 100 * number + i + 1)]))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, lengths = [rows[i] for i in order], [lengths[i] for i in order]
    total = sum(lengths)

    def numbers(extra=0):
        values = torch.randn(total + extra * len(rows), generator=torch.Generator().manual_seed(seed + extra))
        return Ragged(values, torch.tensor(lengths) + extra)

    return Batch(
        {
            "tokens": Ragged.from_rows(rows),
            "completion_lengths": Ragged.scalars(lengths),
            "logprobs": Ragged(-2 - numbers().values.abs(), numbers().lengths),
            "advantages": numbers(),
            "values": numbers(1),
            "returns": numbers(),
        }
    )


def pairs():
    """Two pairs with one prompt, one with another, one of texts that have nothing in common."""
    prompts = [draws(9, seed=1), draws(9, seed=1), draws(5, seed=2), draws(0)]
    sides = [[torch.cat([p, draws(4 + i, seed=10 * i + s)]) for i, p in enumerate(prompts)] for s in (1, 2)]
    return Batch(
        {
            "chosen": Ragged.from_rows(sides[0]),
            "rejected": Ragged.from_rows(sides[1]),
            "num_prompt_tokens": Ragged.scalars([len(p) for p in prompts]),
            "ref_chosen_logps": Ragged.scalars([-9.0, -8.0, -7.0, -6.0]),
            "ref_rejected_logps": Ragged.scalars([-8.0, -9.0, -6.0, -7.0]),
        }
    )


def most_saved(texts, least):
    """By trying every way to part the texts."""

    def parted(rest):
        if not rest:
            yield []
            return
        for size in range(len(rest)):
            for others in itertools.combinations(rest[1:], size):
                left = [i for i in rest[1:] if i not in others]
                yield from ([[rest[0], *others], *more] for more in parted(left))

    def saved(part):
        columns = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*(texts[i] for i in part), strict=False))
        shared = len(list(columns))
        return (len(part) - 1) * shared if shared >= least else 0

    return max(sum(map(saved, parts)) for parts in parted(list(range(len(texts)))))


@settings(max_examples=150, deadline=None)
@given(texts=TEXTS, least=st.integers(1, 3))
def test_fewer_rows_could_run(texts, least):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "MIN_SHARED", least)
        found = families(Ragged.from_rows(texts, torch.int64))
    members = [i for family in found for i in family.members]
    assert len(members) == len(set(members))
    for family in found:
        assert len({tuple(texts[i][: family.num_shared]) for i in family.members}) == 1
        assert all(len(texts[i]) >= family.num_shared >= least for i in family.members)
    saved, best = sum((len(f.members) - 1) * f.num_shared for f in found), most_saved(texts, least)
    assert 0.75 * best <= saved <= best


@settings(max_examples=100, deadline=None)
@given(texts=TEXTS)
def test_a_row_would_not_be_where_it_belongs(texts):
    packed = Ragged.from_rows(texts, torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "MIN_SHARED", 1)
        found = arrange(packed, share=True)
    assert packed.values[found.take][found.place].equal(packed.values)
    assert found.positions[found.place].equal(packed_positions(packed.lengths.tolist()))
    assert sum(found.lengths) == len(found.take) == len(found.positions)
    starts = torch.tensor([0, *found.lengths]).cumsum(0)
    for text, rows in zip(texts, found.place.split(packed.lengths.tolist()), strict=True):
        piece = int(torch.searchsorted(starts, rows[-1], right=True)) - 1
        shared, own = found.spans[piece]
        first = starts[found.before[piece]]
        whole = [*range(first, first + shared), *range(starts[piece], starts[piece] + own)]
        assert rows.tolist() == whole[: len(text)]
    for piece, before in enumerate(found.before):
        assert before == piece or (found.before[before] == before and set(found.before[before:piece]) == {before})


def test_many_texts_that_continue_one_another_would_be_too_deep():
    texts = [[7] * n for n in range(16, 1500)]
    found = families(Ragged.from_rows(texts, torch.int64))
    assert sum(len(family.members) for family in found) > 1


def test_without_common_beginnings_micro_batches_would_change():
    rows = Ragged.from_rows([draws(n, seed=n) for n in (30, 20, 40, 17, 25)])
    sizes = rows.lengths.tolist()
    read = torch.arange(sum(sizes))
    for share in (True, False):
        assert share_in_micro_batches(rows, sizes, 60, read=read, share=share) == micro_batches(sizes, 60)
    assert arrange(rows, share=True).take.equal(torch.arange(len(rows.values)))


@pytest.mark.parametrize("budget", [30, 60, 150, 1000])
def test_a_family_would_be_torn_apart_or_a_budget_passed(short, budget):
    batch = groups([4, 4, 1, 8])
    tokens = batch["tokens"]
    read = TokenLogprobs().rows(batch)
    parts = share_in_micro_batches(tokens, tokens.lengths.tolist(), budget, read=read, share=True)
    assert sorted(row for part in parts for row in part) == list(range(len(batch)))
    running = [len(arrange(tokens.index(torch.tensor(part)), share=True).take) for part in parts]
    assert max(running) <= budget
    prompts = [tuple(row[:9].tolist()) for row in tokens.rows()]
    if budget >= 60:
        whole = sum(running)
        assert whole == len(arrange(tokens, share=True).take)
        assert all(
            len({i for i, part in enumerate(parts) for row in part if prompts[row] == p}) == 1 for p in prompts
        )
    assert sum(running) < len(tokens.values)


def test_both_texts_of_a_pair_count_where_they_are_cut(short):
    batch, reading = pairs(), PairScores()
    sizes = reading.sizes(batch)
    parts = share_in_micro_batches(reading.sequences(batch), sizes, 40, read=reading.rows(batch), share=True)
    running = [len(arrange(reading.sequences(batch.index(part)), share=True).take) for part in parts]
    assert sorted(row for part in parts for row in part) == [0, 1, 2, 3]
    assert max(running) <= 40 < max(sizes[0] + sizes[1], 41)
    assert any({0, 1} <= set(part) for part in parts), "the two pairs of one prompt belong together"


def test_more_rows_would_be_read_at_once_than_the_budget_allows():
    start = draws(60)
    texts = Ragged.from_rows([torch.cat([start, draws(4, seed=i)]) for i in range(1, 21)])
    sizes = texts.lengths.tolist()
    everywhere, behind = torch.arange(sum(sizes)), texts.starts + texts.lengths - 1
    for read, most in ((everywhere, 3), (behind, 20)):
        parts = share_in_micro_batches(texts, sizes, 200, read=read, share=True)
        assert sorted(row for part in parts for row in part) == list(range(20))
        assert max(map(len, parts)) == most, "three texts have 192 rows"


def test_two_runs_of_one_step_would_differ_in_their_last_bits():
    """Rows that several texts have in common get their gradients from all of them, on two threads."""
    start = draws(40)
    tokens = [torch.cat([start, draws(20, seed=i)]) for i in range(1, 17)]
    batch = Batch({"tokens": Ragged.from_rows(tokens), "completion_lengths": Ragged.scalars([20] * 16)})
    found = set()
    with num_threads(2):
        for checkpoint in [False] * 5 + [True] * 5:
            model = tiny_model(hidden_size=128)
            engine = engine_of(model, share=True, budget=10_000, trainable=True, gradient_checkpointing=checkpoint)
            engine.forward(TokenLogprobs(), batch)["new_logprobs"].values.sum().backward()
            found.add(b"".join(p.grad.numpy().tobytes() for p in model.parameters()))
    assert len(found) == 1


READINGS = {
    "logprobs": ("lm", TokenLogprobs(temperature=0.7, with_entropy=True), groups),
    "values": ("value", TokenValues(), groups),
    "scores": ("reward", SequenceScores(), groups),
    "pair logprobs": ("lm", PairLogprobs(), lambda _: pairs()),
    "pair scores": ("reward", PairScores(), lambda _: pairs()),
}
LOSSES = {
    "policy": ("lm", PolicyLoss(reading=TokenLogprobs(with_entropy=True)), groups),
    "value": ("value", ValueLoss(), groups),
    "dpo": ("lm", DPOLoss(), lambda _: pairs()),
    "pairwise": ("reward", PairwiseLoss(), lambda _: pairs()),
}


def engine_of(model, *, share, budget=70, trainable=False, **options):
    config = TrainableConfig(share_prefixes=share, max_tokens_per_micro_batch=budget, **options)
    return TrainingEngine(model, config, trainable=trainable)


@pytest.mark.parametrize("case", READINGS)
def test_a_reading_would_be_another(short, case):
    head, reading, make = READINGS[case]
    batch, model = make([3, 1, 5]), tiny_model(head)
    whole, shared = (engine_of(model, share=share).infer(reading, batch) for share in (False, True))
    assert whole.fields.keys() == shared.fields.keys()
    for key in whole.fields:
        assert whole[key].lengths.equal(shared[key].lengths)
        torch.testing.assert_close(shared[key].values, whole[key].values, atol=1e-5, rtol=1e-5)


def gradients_of(model, loss, batch, **options):
    engine = engine_of(model, trainable=True, **options)
    stats = engine.accumulate(loss, batch)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, stats, engine.work.flops


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", LOSSES)
def test_a_gradient_would_be_another(short, case, checkpointing):
    head, loss, make = LOSSES[case]
    batch = make([3, 1, 5])
    found = [
        gradients_of(tiny_model(head), loss, batch, share=share, gradient_checkpointing=checkpointing)
        for share in (False, True)
    ]
    (whole, stats, flops), (shared, others, fewer) = found
    assert relative_difference(shared, whole) < 1e-5
    assert others == pytest.approx(stats, rel=1e-5, abs=1e-6)
    assert fewer < 0.9 * flops, "nothing was shared"


@pytest.mark.parametrize("name", MODELS)
def test_a_family_of_models_would_have_another_gradient(short, name):
    batch = groups([3, 1, 4])
    loss = PolicyLoss(reading=TokenLogprobs())
    whole, shared = (gradients_of(family_model(name), loss, batch, share=share)[0] for share in (False, True))
    assert relative_difference(shared, whole) < 1e-5


def test_a_row_would_get_other_bits_by_the_kernels(short):
    model = tiny_model(hidden_size=128, vocab_size=32, scale=0.1, dtype=torch.bfloat16)
    if products_for(next(model.parameters())) is None:
        pytest.skip("no kernels multiply on this machine")
    batch = groups([3, 1, 5], prompt=70)
    found = [engine_of(model, share=share, budget=200).infer(TokenLogprobs(), batch) for share in (False, True)]
    assert found[0]["new_logprobs"].values.equal(found[1]["new_logprobs"].values)


def test_the_layout_of_two_texts_would_be_another(short):
    prompt = draws(9)
    packed = Ragged.from_rows([torch.cat([prompt, torch.tensor([i, 4, 5])]) for i in (1, 2)])
    found = arrange(packed, share=True)
    assert families(packed) == [Family(members=[0, 1], num_shared=9)]
    assert found.lengths == [9, 3, 3]
    assert found.spans == [(0, 9), (9, 3), (9, 3)]
    assert found.place.tolist() == [*range(12), *range(9), 12, 13, 14]
