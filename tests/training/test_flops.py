"""Operations of training, against torch's own count of the products that ran."""

import pytest
import torch
from tiny_rl import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from meshift.models.attention import PackedAttention, packed_positions
from meshift.training.flops import _num_pairs, training_flops
from meshift.training.optimizer import freeze_layers

LENGTHS = [5, 9, 1]
PRODUCTS = ("aten.mm", "aten.addmm")


def products_that_ran(model, num_read):
    """What torch counts in linear layers, forward and backward; attention's own products are not among them."""
    tokens = torch.randint(0, model.config.vocab_size, (sum(LENGTHS),))
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens, packed_positions(LENGTHS), PackedAttention(LENGTHS))
        model.head(hidden[:num_read]).float().sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if str(op) in PRODUCTS)


def attention_by_hand(model, num_trained):
    config = model.config
    pairs = sum(1 for n in LENGTHS for i in range(n) for j in range(i + 1))
    return 4 * config.num_heads * config.head_dim * pairs * (config.num_layers - num_trained + 3 * num_trained)


@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("num_frozen", [0, 1, 2])
def test_equals_what_torch_counts(head, num_frozen):
    model = tiny_model(head)
    freeze_layers(model, num_frozen, model.config.num_layers)
    expected = products_that_ran(model, 4) + attention_by_hand(model, model.config.num_layers - num_frozen)
    assert training_flops(model, LENGTHS, 4) == expected


def test_a_window_leaves_out_what_it_hides():
    for window in (None, 1, 3, 20):
        seen = [min(i + 1, window or 99) for i in range(9)]
        assert _num_pairs(9, window) == sum(seen)
