"""What autograd sees of the kernels, against the same in plain torch and fp32; and where weights' gradients go."""

import pytest
import torch
from kernel_twins import ACTIVATIONS, causal_attention, near, random_numbers
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from meshift.config.sections import TrainableConfig
from meshift.kernels import functions
from meshift.kernels.cpu import Sequences
from meshift.kernels.functions import Turn
from meshift.models.rotary import rotate
from meshift.training.optimizer import MasterAdamW

ROWS, HIDDEN, WIDE, DIM = 21, 64, 96, 32
EPS = 1e-5


def leaves(*shapes, scale=0.3):
    """bfloat16 parameters."""
    return [random_numbers(*shape, seed=i, scale=scale).requires_grad_() for i, shape in enumerate(shapes)]


def hold(function, twin, tensors):
    """Outputs and all gradients of `function(*tensors)` are those of `twin` in fp32."""
    wide = [tensor.detach().float().requires_grad_(tensor.requires_grad) for tensor in tensors]
    found, expected = function(*tensors), twin(*wide)
    found, expected = ([out] if isinstance(out, torch.Tensor) else list(out) for out in (found, expected))
    grads = [random_numbers(*out.shape, seed=9 + i) for i, out in enumerate(found)]
    asked = [i for i, tensor in enumerate(tensors) if tensor.requires_grad]
    ours = torch.autograd.grad(found, [tensors[i] for i in asked], grads)
    theirs = torch.autograd.grad(expected, [wide[i] for i in asked], [grad.float() for grad in grads])
    for one, true in zip([*found, *ours], [*expected, *theirs], strict=True):
        assert one.dtype == torch.bfloat16
        near(one, true, within=2**-6)


@pytest.mark.parametrize("plus_one", [True, False])
@pytest.mark.parametrize("shape", [(ROWS, HIDDEN), (ROWS, 4, 33)], ids=str)
def test_a_norm_and_its_gradients_would_differ_from_torchs(cpu, plus_one, shape):
    hold(
        lambda x, w: functions.rms_norm(cpu, x, w, EPS, plus_one=plus_one),
        lambda x, w: F.rms_norm(x, w.shape, w + 1 if plus_one else w, EPS),
        leaves(shape, shape[-1:]),
    )


@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_and_its_gradients_would_differ_from_torchs(cpu, biased):
    tensors = leaves((ROWS, HIDDEN), (WIDE, HIDDEN), *([(WIDE,)] * biased))
    hold(lambda x, w, b=None: functions.linear(cpu, x, w, b), F.linear, tensors)


def test_rows_that_are_not_contiguous_would_be_read_as_if_they_were(cpu):
    tensors = leaves((HIDDEN, ROWS), (WIDE, HIDDEN))
    hold(lambda x, w: functions.linear(cpu, x.t(), w, None), lambda x, w: F.linear(x.t(), w), tensors)
    (x, w), out = tensors, torch.ones(WIDE, 1).bfloat16()
    functions.linear(cpu, x.t(), w, None).backward(out.t().expand(ROWS, WIDE))  # a gradient without strides
    near(w.grad, x.detach().float().sum(1).expand(WIDE, HIDDEN))


def angles_of(num_rows, half=DIM // 2):
    angles = 10 * random_numbers(num_rows, 1, half, dtype=torch.float32)
    return angles.cos().bfloat16(), angles.sin().bfloat16()


@pytest.mark.parametrize("dim", [DIM, 2 * DIM])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("biased", [True, False])
def test_queries_keys_and_values_would_differ_from_torchs(cpu, biased, turned, dim):
    widths = [4 * dim, 2 * dim, 2 * dim]
    angles = angles_of(ROWS) if turned else None
    tensors = leaves((ROWS, HIDDEN), *((width, HIDDEN) for width in widths), *((w,) for w in widths * biased))

    def ours(x, *weights):
        biases = weights[3:] if biased else (None, None, None)
        return functions.query_key_value(cpu, x, weights[:3], biases, Turn(dim, angles))

    def twin(x, *weights):
        biases = weights[3:] if biased else (None, None, None)
        heads = [F.linear(x, w, b).unflatten(1, (-1, dim)) for w, b in zip(weights[:3], biases, strict=True)]
        wide = None if angles is None else [part.float() for part in angles]
        return [head if wide is None or i == 2 else rotate(head, *wide) for i, head in enumerate(heads)]

    hold(ours, twin, tensors)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("which", [(0, 1, 2), (0, 2), (1,)], ids=str)
def test_what_is_added_to_queries_keys_and_values_would_not_be_turned_with_them(cpu, which, turned):
    widths = [4 * DIM, 2 * DIM, 2 * DIM]
    angles = angles_of(ROWS) if turned else None
    tensors = leaves((ROWS, HIDDEN), *((w, HIDDEN) for w in widths), *((ROWS, widths[i]) for i in which))
    for frozen in tensors[1:4]:
        frozen.requires_grad_(False)

    def ours(x, *given):
        more = dict(zip(which, given[3:], strict=True))
        bare = (None, None, None)
        return functions.query_key_value(
            cpu, x, given[:3], bare, Turn(DIM, angles), [more.get(i) for i in range(3)]
        )

    def twin(x, *given):
        more = dict(zip(which, given[3:], strict=True))
        heads = [(F.linear(x, w) + more.get(i, 0)).unflatten(1, (-1, DIM)) for i, w in enumerate(given[:3])]
        wide = None if angles is None else [part.float() for part in angles]
        return [head if wide is None or i == 2 else rotate(head, *wide) for i, head in enumerate(heads)]

    hold(ours, twin, tensors)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
def test_a_gate_and_its_gradients_would_differ_from_torchs(cpu, activation):
    hold(
        lambda gate, up: functions.gated(cpu, gate, up, activation),
        lambda gate, up: ACTIVATIONS[activation](gate) * up,
        leaves((ROWS, WIDE), (ROWS, WIDE), scale=1.0),
    )


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
def test_a_gated_mlp_and_its_gradients_would_differ_from_torchs(cpu, activation, biased):
    shapes = [(ROWS, HIDDEN), (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)]
    tensors = leaves(*shapes, *[(WIDE,), (WIDE,), (HIDDEN,)] * biased)

    def ours(x, *weights):
        biases = weights[3:] if biased else (None, None, None)
        return functions.gated_mlp(cpu, x, weights[:3], biases, activation)

    def twin(x, gate, up, down, *biases):
        biases = biases or (None, None, None)
        wide = ACTIVATIONS[activation](F.linear(x, gate, biases[0])) * F.linear(x, up, biases[1])
        return F.linear(wide, down, biases[2])

    hold(ours, twin, tensors)


def test_a_gated_mlp_of_which_only_biases_are_trained_would_have_no_gradients(cpu):
    shapes = [(ROWS, HIDDEN), (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE), (WIDE,), (WIDE,), (HIDDEN,)]
    tensors = leaves(*shapes)
    for frozen in tensors[:4]:
        frozen.requires_grad_(False)
    hold(
        lambda x, *w: functions.gated_mlp(cpu, x, w[:3], w[3:], "silu"),
        lambda x, g, u, d, a, b, c: F.linear(F.silu(F.linear(x, g, a)) * F.linear(x, u, b), d, c),
        tensors,
    )


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_weight_would_spoil_the_gradients_of_the_others(cpu, frozen):
    tensors = leaves((ROWS, HIDDEN), (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE))
    tensors[frozen].requires_grad_(False)
    hold(
        lambda x, *w: functions.gated_mlp(cpu, x, w, (None, None, None), "silu"),
        lambda x, gate, up, down: F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down),
        tensors,
    )


@pytest.mark.parametrize("window", [0, 4])
def test_attention_and_its_gradients_would_differ_from_torchs(cpu, window):
    lengths = [9, 0, 1, 11]
    sequences = Sequences(
        starts=torch.tensor([0, *lengths]).cumsum(0), before=torch.arange(len(lengths)), scale=0.2, window=window
    )
    hold(
        lambda *heads: functions.packed_attention(cpu, *heads, sequences),
        lambda *heads: causal_attention(heads, lengths, scale=0.2, window=window),
        leaves((ROWS, 4, DIM), (ROWS, 2, DIM), (ROWS, 2, DIM), scale=1.0),
    )


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gradient_sum_would_not_get_what_autograd_is_not_told(cpu, checkpointed):
    """All functions in a chain; the sums are those of fp32 and not rounded."""
    shapes = [(HIDDEN,), *[(HIDDEN, HIDDEN)] * 3, *[(HIDDEN,)] * 3, (WIDE, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)]
    weights = leaves(*shapes, (HIDDEN, HIDDEN), (HIDDEN,))
    x = random_numbers(ROWS, HIDDEN).requires_grad_()

    def chain(x):
        norm, *rest = weights
        rows = functions.rms_norm(cpu, x, norm, EPS)
        heads = functions.query_key_value(cpu, rows, rest[:3], rest[3:6], Turn(DIM, angles_of(ROWS)))
        rows = sum(part.flatten(1) for part in heads)
        rows = functions.gated_mlp(cpu, rows, rest[6:9], (None, None, None), "silu")
        return functions.linear(cpu, rows, rest[9], rest[10])

    def backward():
        out = checkpoint(chain, x, use_reentrant=False) if checkpointed else chain(x)
        return torch.autograd.grad(out.float().square().sum(), [x, *weights], allow_unused=True)

    expected = backward()
    sums = [torch.zeros(weight.shape) for weight in weights]
    for weight, into in zip(weights, sums, strict=True):
        weight.gradient_sum = lambda into=into: into
    found = backward()
    assert found[0].equal(expected[0])
    assert all(part is None for part in found[1:])
    assert all(one.bfloat16().equal(true) for one, true in zip(sums, expected[1:], strict=True))
    assert any(not one.bfloat16().float().equal(one) for one in sums)
    before = [one.clone() for one in sums]
    backward()
    for one, half in zip(sums, before, strict=True):
        torch.testing.assert_close(one, 2 * half)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_micro_batches_would_be_rounded_before_they_are_added(cpu, checkpointed):
    """Many small ones after a large one: in bfloat16 they would be lost."""
    layer = torch.nn.Linear(4, 2, bias=False, dtype=torch.bfloat16)
    optimizer = MasterAdamW(layer, TrainableConfig())

    def backward(size):
        def loss(x):
            return functions.linear(cpu, x, layer.weight, None)

        x = torch.full((1, 4), size).bfloat16().requires_grad_()
        out = checkpoint(loss, x, use_reentrant=False) if checkpointed else loss(x)
        out.sum().backward()

    backward(1.0)
    for _ in range(64):
        backward(2.0**-9)
    (master,) = optimizer.masters
    assert layer.weight.grad is None
    assert master.grad.equal(torch.full((2, 4), 1.125))
