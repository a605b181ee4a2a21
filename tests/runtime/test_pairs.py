"""Weights of pairs: every prompt counts as one if asked for, and weights leave the learning rate alone."""

from dataclasses import replace

import pytest
import torch

from meshift.batch import Batch, Ragged
from meshift.config.sections import PairDataConfig
from meshift.data.preferences import Pair, PreferenceData
from meshift.errors import DataError
from meshift.runtime.pairs import PairSets, PairSource, pair_batch, pair_weights, weights_in_words


def pair(prompt, *, weight=1.0, margin=None, where="pairs.jsonl:1"):
    tokens = [*prompt, 7]
    return Pair(
        chosen=tokens,
        rejected=[*prompt, 8],
        num_prompt_tokens=len(prompt),
        where=where,
        weight=weight,
        margin=margin,
    )


PAIRS = [pair([1]), pair([1]), pair([1]), pair([1, 2]), pair([3])]


def test_every_prompt_counts_as_one_whatever_its_number_of_pairs():
    weights = pair_weights(PAIRS, by_prompt=True)
    assert weights == pytest.approx([5 / 9, 5 / 9, 5 / 9, 5 / 3, 5 / 3])
    assert sum(weights[:3]) == pytest.approx(weights[3])
    assert pair_weights(PAIRS, by_prompt=False) == [1.0] * 5


def test_given_weights_share_a_prompts_weight_and_keep_a_mean_of_one():
    pairs = [pair([1], weight=3.0), pair([1], weight=1.0), pair([2], weight=0.25)]
    assert pair_weights(pairs, by_prompt=False) == pytest.approx([w * 3 / 4.25 for w in (3.0, 1.0, 0.25)])
    assert pair_weights(pairs, by_prompt=True) == pytest.approx([1.5 * 0.75, 1.5 * 0.25, 1.5])


def test_pairs_without_a_prompt_have_none_in_common():
    pairs = [pair([]), pair([]), pair([1]), pair([1])]
    assert pair_weights(pairs, by_prompt=True) == pytest.approx([4 / 3, 4 / 3, 2 / 3, 2 / 3])


def test_a_prompt_of_weight_zero_is_left_out_and_nothing_but_zeros_is_an_error():
    pairs = [pair([1], weight=0.0), pair([2])]
    assert pair_weights(pairs, by_prompt=True) == [0.0, 2.0]
    for by_prompt in (False, True):
        with pytest.raises(DataError, match=r"pairs\.jsonl:1: this pair and all others have weight 0"):
            pair_weights([replace(pairs[0]), pairs[0]], by_prompt=by_prompt)


def test_a_batch_has_the_margins_and_weights_of_its_own_pairs():
    pairs = [pair([i], weight=1.0 + i, margin=0.5 * i if i else None) for i in range(4)]
    config = PairDataConfig(dataset_name="d", batch_size=2)
    source = PairSource(config, pairs, seed=0)
    source.known = Batch({"ref_chosen_logps": Ragged.scalars([-0.0, -1.0, -2.0, -3.0])})
    for step in range(4):
        rows, batch = source.rows(step), source.next_batch(step)
        assert [text.tolist() for text in batch["chosen"].rows()] == [pairs[i].chosen for i in rows]
        assert batch["required_margin"].values.tolist() == [0.5 * i for i in rows]
        torch.testing.assert_close(batch["pair_weight"].values, torch.tensor([(1.0 + i) / 2.5 for i in rows]))
        assert batch["ref_chosen_logps"].values.tolist() == [-float(i) for i in rows]
        assert batch["num_prompt_tokens"].values.tolist() == [1, 1]


def test_held_out_pairs_count_alike():
    batch = pair_batch([pair([1], weight=9.0), pair([2])])
    assert batch["pair_weight"].values.tolist() == [1.0, 1.0]


def test_pairs_with_a_blank_response_are_named_by_run_and_dry_run():
    data = PreferenceData(pairs=[], overlong=(), identical=(), blank=("a.jsonl:3", "a.jsonl:7"))
    sets = PairSets(train=data, heldout=None)
    assert sets.messages() == ("2 pairs with a blank response were left out, the first at a.jsonl:3",)
    assert sets.described()[0] == ("pairs", "0 (0 over-long and 0 identical left out; 2 with a blank response)")


def test_a_dry_run_says_how_pairs_are_weighted_only_where_they_are():
    by_prompt = PairDataConfig(dataset_name="d", weight_by_prompt=True)
    assert weights_in_words(by_prompt, PAIRS) == [("weights", "3 prompts, each counts as one (1.67 pairs each)")]
    plain = PairDataConfig(dataset_name="d")
    assert weights_in_words(plain, PAIRS) == []
    given = [pair([1], weight=2.0), pair([2], weight=0.5)]
    assert weights_in_words(plain, given) == [("weights", "from the data, 0.5 to 2, scaled to a mean of 1")]
