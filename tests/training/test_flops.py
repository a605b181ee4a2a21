"""Operations of training, against torch's own count of the products that ran."""

import pytest
import torch
from tiny_rl import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from meshift.config.sections import LoraConfig, TrainableConfig
from meshift.models.adapters import add_adapter
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.config import Adapter
from meshift.training.flops import _num_pairs, training_flops
from meshift.training.optimizer import freeze, freeze_layers

LENGTHS = [5, 9, 1]
PRODUCTS = ("aten.mm", "aten.addmm")


def products_that_ran(model, num_read, rows=None):
    """What torch counts in linear layers, forward and backward; attention's own products are not among them."""
    tokens = torch.randint(0, model.config.vocab_size, (sum(LENGTHS),))
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens, packed_positions(LENGTHS), PackedAttention(LENGTHS), rows=rows)
        model.head(hidden[:num_read]).float().sum().backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for op, count in counts.items() if str(op) in PRODUCTS)


def attention_by_hand(model, num_trained):
    config = model.config
    pairs = sum(1 for n in LENGTHS for i in range(n) for j in range(i + 1))
    return 4 * config.num_heads * config.head_dim * pairs * (config.num_layers - num_trained + 3 * num_trained)


@pytest.mark.parametrize("rows", [None, [2, 5, 11, 14]])
@pytest.mark.parametrize("head", ["lm", "value"])
@pytest.mark.parametrize("num_frozen", [0, 1, 2])
def test_equals_what_torch_counts(head, num_frozen, rows):
    model = tiny_model(head)
    freeze_layers(model, num_frozen, model.config.num_layers)
    picked = None if rows is None else torch.tensor(rows)
    expected = products_that_ran(model, 4, picked)
    expected += attention_by_hand(model, model.config.num_layers - num_frozen)
    spans = [(0, n) for n in LENGTHS]
    assert training_flops(model, spans, 4, sum(LENGTHS) if rows is None else len(rows)) == expected


def test_rows_that_come_before_would_count_twice():
    model = tiny_model()
    apart, together = (
        training_flops(model, spans, 4, 4) for spans in ([(0, 9), (0, 9)], [(0, 5), (5, 4), (5, 4)])
    )
    weights = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.dim() == 2)
    first, last = (sum(p.numel() for p in layer.parameters() if p.dim() == 2) for layer in model.layers)
    assert weights == first + last
    own = model.layers[1].attention
    before = sum(part.weight.numel() for part in (own.query, own.key, own.value))
    rows = 3 * 2 * 5 * (first + before)  # five rows less through all but what follows the last attention
    pairs = 3 * 4 * model.config.num_heads * model.config.head_dim * len(model.layers) * 15  # 5 rows see 15
    assert apart - together == rows + pairs


def test_a_window_leaves_out_what_it_hides():
    for window in (None, 1, 3, 20):
        seen = [min(i + 1, window or 99) for i in range(9)]
        assert _num_pairs(9, window) == sum(seen)


@pytest.mark.parametrize("targets", [("attention.query", "attention.value", "mlp.down"), None])
@pytest.mark.parametrize("rows", [None, [2, 5, 11, 14]])
def test_frozen_matrices_beside_adapters_have_no_gradient_of_their_own(rows, targets):
    model = tiny_model()
    add_adapter(model, Adapter(rank=3, alpha=6, targets=targets or model.config.linear_names))
    freeze(model, TrainableConfig(lora=LoraConfig()))
    picked = None if rows is None else torch.tensor(rows)
    expected = products_that_ran(model, 4, picked) + attention_by_hand(model, model.config.num_layers)
    spans = [(0, n) for n in LENGTHS]
    assert training_flops(model, spans, 4, sum(LENGTHS) if rows is None else len(rows)) == expected
