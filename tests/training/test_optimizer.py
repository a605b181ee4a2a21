"""AdamW on fp32 masters, frozen layers, and a schedule that counts steps of the run."""

import math

import pytest
import torch
from tiny_rl import random_rollout, tiny_model

from meshift.algorithms.losses import PolicyLoss
from meshift.config.sections import TrainableConfig
from meshift.errors import ConfigError
from meshift.runtime.role import LocalRole
from meshift.training.engine import TrainingEngine, TrainTask
from meshift.training.optimizer import MasterAdamW, learning_rate
from meshift.training.readings import TokenLogprobs


def set_gradients(model, seed):
    """The same random gradients for any dtype, through the hooks that training uses."""
    draw = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(p.shape, generator=draw) for p in model.parameters()]
    loss = sum((p.float() * g).sum() for p, g in zip(model.parameters(), gradients, strict=True))
    loss.backward()


def test_steps_equal_adamw_on_an_fp32_copy_with_clipping_and_decay_of_matrices_only():
    config = TrainableConfig(
        weight_decay=0.1, max_grad_norm=0.5, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6
    )
    model, copy = tiny_model(), tiny_model()
    optimizer = MasterAdamW(model, config)
    parameters = list(copy.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, betas=(0.8, 0.9), eps=1e-6)
    for step, rate in enumerate((1e-2, 3e-3, 1e-3)):
        set_gradients(model, step)
        set_gradients(copy, step)
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
        for parameter in parameters:
            parameter.grad.mul_(min(1.0, 0.5 / norm))
        for group in plain.param_groups:
            group["lr"] = rate
        plain.step()
        plain.zero_grad()
        assert optimizer.step(rate) == pytest.approx(norm, rel=1e-5)
    for ours, theirs in zip(model.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_vectors_are_not_decayed():
    model = tiny_model()
    optimizer = MasterAdamW(model, TrainableConfig(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if parameter.dim() > 1 else 1.0)
        torch.testing.assert_close(parameter.detach(), expected)


def test_bf16_weights_are_their_masters_rounded_and_many_tiny_updates_add_up():
    model = tiny_model(dtype=torch.bfloat16)
    optimizer = MasterAdamW(model, TrainableConfig(max_grad_norm=1e9))
    start = [p.detach().float().clone() for p in model.parameters()]
    weight = model.layers[0].mlp.up.weight
    for _ in range(40):
        sum(p.sum() for p in model.parameters()).backward()
        before = weight.detach().clone()
        optimizer.step(1e-4)
    # Adam moves each weight by the rate, here far below bf16's resolution of a weight near 0.3.
    for master, first in zip(optimizer.masters, start, strict=True):
        torch.testing.assert_close(master.detach(), first - 40 * 1e-4, rtol=0, atol=2e-5)
    assert (weight == before).float().mean() > 0.5, "a single update should be invisible in bf16"
    for parameter, master in zip(model.parameters(), optimizer.masters, strict=True):
        assert torch.equal(parameter, master.detach().bfloat16())
    assert not torch.equal(weight.float(), start[[p is weight for p in model.parameters()].index(True)])


def test_bf16_gradients_are_summed_in_fp32():
    """256 + 1 in bf16 stays 256."""
    model = tiny_model(dtype=torch.bfloat16)
    optimizer = MasterAdamW(model, TrainableConfig())
    for size in (256.0, 1.0, 1.0, 1.0):
        (model.norm.weight * size).sum().backward()
    master = next(m for m, p in zip(optimizer.masters, model.parameters(), strict=True) if p is model.norm.weight)
    assert master.grad.dtype == torch.float32
    assert torch.equal(master.grad, torch.full_like(master, 259.0))
    assert model.norm.weight.grad is None


def test_a_discarded_gradient_is_not_in_the_next_update():
    model, other = tiny_model(), tiny_model()
    optimizer, clean = MasterAdamW(model, TrainableConfig()), MasterAdamW(other, TrainableConfig())
    set_gradients(model, 1)
    optimizer.discard()
    set_gradients(model, 2)
    set_gradients(other, 2)
    assert optimizer.step(1e-2) == pytest.approx(clean.step(1e-2))
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_layers_stay_and_everything_else_moves(tied):
    model = tiny_model(tied=tied)
    engine = TrainingEngine(model, TrainableConfig(num_frozen_layers=1), trainable=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.train(TrainTask(loss=PolicyLoss(reading=TokenLogprobs())), random_rollout(), rate=1e-2, seed=0)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    frozen = {name for name in before if name.startswith(("embedding.", "layers.0."))}
    assert moved == set(before) - frozen


def test_freezing_more_layers_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="num_frozen_layers = 3, but the model has 2 layers"):
        TrainingEngine(tiny_model(), TrainableConfig(num_frozen_layers=3), trainable=True)
    with pytest.raises(ConfigError, match="every parameter is frozen"):
        MasterAdamW(torch.nn.Linear(2, 2).requires_grad_(False), TrainableConfig())


def test_schedules_warm_up_and_end_where_they_should():
    keys, least = {"learning_rate": 1.0, "warmup_steps": 4}, {"min_lr_ratio": 0.1}
    configs = {
        "constant": TrainableConfig(lr_scheduler_type="constant", **keys),
        **{kind: TrainableConfig(lr_scheduler_type=kind, **keys, **least) for kind in ("linear", "cosine")},
    }
    rates = {kind: [learning_rate(config, step, 14) for step in range(14)] for kind, config in configs.items()}
    for kind, values in rates.items():
        assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]), kind
        assert values[4] == 1.0
    assert rates["constant"][4:] == [1.0] * 10
    assert rates["linear"][4:] == pytest.approx([0.1 + 0.9 * (1 - i / 10) for i in range(10)])
    half = [0.1 + 0.45 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert rates["cosine"][4:] == pytest.approx(half)
    config = configs["linear"]
    assert learning_rate(config, 14, 14) == learning_rate(config, 99, 14) == pytest.approx(0.1)


def test_epochs_and_mini_batches_do_not_stretch_the_schedule():
    """Trap 3: the rate of a step is the same however many updates a step makes."""
    rates = []
    for num_epochs, num_parts in ((1, 1), (3, 2)):
        config = TrainableConfig(learning_rate=1e-3, lr_scheduler_type="linear")
        role = LocalRole("actor", tiny_model(), config, trainable=True, max_steps=4)
        task = TrainTask(
            loss=PolicyLoss(reading=TokenLogprobs()), num_epochs=num_epochs, num_mini_batches=num_parts
        )
        rates.append([role.train(task, random_rollout(), step=s).metrics["actor/lr"] for s in range(4)])
    assert rates[0] == rates[1] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
