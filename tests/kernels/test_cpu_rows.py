"""Norms, rotary turns, writes to the cache and the gradients of a gate."""

import pytest
import torch
from kernel_twins import ACTIVATIONS, near, random_numbers, rounded_once
from threads import num_threads

from meshift.models.rotary import rotate

EPS = 1e-5


def norm_of(x, weight, plus_one):
    """In fp64."""
    x, weight = x.double(), weight.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (weight + 1 if plus_one else weight)


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 16), (2, 3, 33), (130, 64), (0, 8)], ids=str)
def test_a_norm_would_differ_from_its_formula(cpu, shape, plus_one):
    x, weight = random_numbers(*shape, scale=3), random_numbers(shape[-1], seed=1)
    inverses = torch.empty(x.numel() // shape[-1])
    found = cpu.rms_norm(x, weight, EPS, plus_one=plus_one, inverses=inverses)
    assert found.shape == x.shape
    rounded_once(found, norm_of(x, weight, plus_one))
    expected = (x.double().square().mean(-1) + EPS).rsqrt().flatten()
    torch.testing.assert_close(inverses.double(), expected, rtol=1e-5, atol=0)
    assert cpu.rms_norm(x, weight, EPS, plus_one=plus_one).equal(found)


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("shape", [(1, 7), (63, 16), (65, 33), (200, 48), (0, 8)], ids=str)
def test_a_norms_gradients_would_differ_from_autograds(cpu, shape, plus_one):
    x, weight, grad = random_numbers(*shape), random_numbers(shape[-1], seed=1), random_numbers(*shape, seed=2)
    wide = [part.double().requires_grad_() for part in (x, weight)]
    expected = torch.autograd.grad(norm_of(*wide, plus_one), wide, grad.double())
    inverses = torch.empty(len(x))
    cpu.rms_norm(x, weight, EPS, plus_one=plus_one, inverses=inverses)
    found = [cpu.rms_norm_backward(x, grad, inverses, weight, plus_one=plus_one) for _ in range(2)]
    rounded_once(found[0][0], expected[0])
    near(found[0][1], expected[1], within=1e-5)
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_a_norms_bits_would_depend_on_company_or_threads(cpu):
    x, weight, grad = random_numbers(200, 48), random_numbers(48), random_numbers(200, 48, seed=2)
    results = []
    for threads in (1, 2):
        with num_threads(threads):
            inverses = torch.empty(len(x))
            found = cpu.rms_norm(x, weight, EPS, inverses=inverses)
            results.append((found, *cpu.rms_norm_backward(x, grad, inverses, weight, plus_one=False)))
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
    assert cpu.rms_norm(x[70:71].clone(), weight, EPS).equal(results[0][0][70:71])


def angles_of(num_rows, half):
    angles = 10 * random_numbers(num_rows, 1, half, dtype=torch.float32)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


@pytest.mark.parametrize(("dim", "half"), [(32, 16), (64, 32), (64, 16), (80, 16), (256, 128)])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_a_turn_would_differ_from_rotary(cpu, num_rows, dim, half):
    heads, angles = random_numbers(num_rows, 3, dim), angles_of(num_rows, half)
    found = heads.clone()
    cpu.turn(found, *angles)
    rounded_once(found, rotate(heads.float(), *(part.float() for part in angles)))
    assert found[..., 2 * half :].equal(heads[..., 2 * half :])


def test_a_turn_by_the_negative_angles_would_not_take_it_back(cpu):
    heads, (cosine, sine) = random_numbers(9, 2, 64), angles_of(9, 32)
    found = heads.clone()
    cpu.turn(found, cosine, sine)
    assert (found - heads).abs().max() > 1
    cpu.turn(found, cosine, -sine)
    near(found, heads, within=2**-6)


def test_a_turn_would_touch_what_stands_beside_the_heads(cpu):
    whole, angles = random_numbers(6, 5 * 32), angles_of(6, 16)
    turned = whole.clone()
    cpu.turn(turned[:, 32:96].unflatten(1, (2, 32)), *angles)
    alone = whole[:, 32:96].clone().unflatten(1, (2, 32))
    cpu.turn(alone, *angles)
    assert turned[:, 32:96].equal(alone.flatten(1))
    assert turned[:, :32].equal(whole[:, :32])
    assert turned[:, 96:].equal(whole[:, 96:])


@pytest.mark.parametrize("dim", [7, 32])
@pytest.mark.parametrize("num_rows", [0, 1, 5, 300])
def test_heads_would_be_put_elsewhere_than_at_their_places(cpu, num_rows, dim):
    rows = random_numbers(num_rows, 4, dim)[:, 1:3]
    target = torch.full((700, dim), 7.0, dtype=torch.bfloat16)
    places = torch.randperm(700, generator=torch.Generator().manual_seed(0))[: 2 * num_rows].view(-1, 2)
    expected = target.clone()
    expected[places.flatten()] = rows.flatten(0, 1)
    cpu.put(rows, places, target)
    assert target.equal(expected)


@pytest.mark.parametrize("activation", ["silu", "gelu_new", "relu", "none"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (20, 96), (0, 4)], ids=str)
def test_a_gates_gradients_would_differ_from_autograds(cpu, activation, shape):
    gate, up, grad = (random_numbers(*shape, seed=s, scale=2) for s in range(3))
    wide = [part.float().requires_grad_() for part in (gate, up)]
    expected = ACTIVATIONS[activation](wide[0]) * wide[1]
    product, both = cpu.gate_backward(gate, up, grad, activation)
    rounded_once(product, expected.detach())
    for found, true in zip(
        both.split(shape[1], dim=1), torch.autograd.grad(expected, wide, grad.float()), strict=True
    ):
        torch.testing.assert_close(found.float(), true, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("activation", ["silu", "gelu_new", "relu"])
def test_an_activations_slope_would_be_lost_at_large_numbers(cpu, activation):
    gate = torch.tensor([[-1e5, -90.0, -12, -0.5, 0.5, 12, 90, 1e5]]).bfloat16()
    one = torch.ones_like(gate)
    wide = gate.float().requires_grad_()
    (expected,) = torch.autograd.grad(ACTIVATIONS[activation](wide).sum(), wide)
    to_gate = cpu.gate_backward(gate, one, one, activation)[1][:, :8]
    torch.testing.assert_close(to_gate.float(), expected, rtol=2**-8, atol=1e-5)
