"""Products with packed weights, and the gradients of weights: values, bits, and that nothing else is written."""

import pytest
import torch
from kernel_twins import ACTIVATIONS, near, random_numbers, rounded_once
from threads import num_threads

ROWS = [1, 2, 3, 7, 8, 9, 130, 300]


def product_of(rows, weight):
    return rows.float() @ weight.float().t()


@pytest.mark.parametrize("num_rows", ROWS)
@pytest.mark.parametrize("columns", [1, 33, 48, 97])
def test_a_number_of_rows_or_columns_would_not_be_served(cpu, num_rows, columns):
    rows, weight = random_numbers(num_rows, 34), random_numbers(columns, 34)
    rounded_once(cpu.product(rows, cpu.pack(weight)), product_of(rows, weight))


@pytest.mark.parametrize("inputs", [2, 30, 2048, 2050, 4100])
@pytest.mark.parametrize("num_rows", [3, 20])
def test_a_block_of_inputs_would_be_left_out(cpu, num_rows, inputs):
    rows, weight = random_numbers(num_rows, inputs), random_numbers(50, inputs)
    found = cpu.product(rows, cpu.pack(weight), out=torch.empty(num_rows, 50))
    near(found, rows.double() @ weight.double().t(), within=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_other", [True, False])
def test_bias_activation_and_sum_would_come_in_another_order(cpu, activation, with_bias, with_other):
    rows, weight = random_numbers(11, 16), random_numbers(35, 16)
    bias = random_numbers(35, seed=1) if with_bias else None
    other = random_numbers(11, 35, seed=2) if with_other else None
    expected = ACTIVATIONS[activation](product_of(rows, weight) + (0 if bias is None else bias.float()))
    expected = expected + (0 if other is None else other.float())
    packed = cpu.pack(weight)
    options = {"bias": bias, "activation": activation, "other": other}
    rounded_once(cpu.product(rows, packed, **options), expected)
    wide = cpu.product(rows, packed, out=torch.empty(11, 35), **options)
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_numbers_would_leave_an_activation_without_a_number(cpu, activation):
    rows = torch.tensor([[-1e30, -1e5, -90, -20, 0, 20, 90, 1e5, 1e30, -0.0]]).bfloat16().t().contiguous()
    rows = torch.cat([rows, torch.zeros_like(rows)], dim=1)
    packed = cpu.pack(torch.tensor([[1.0, 0.0]]).bfloat16())
    expected = ACTIVATIONS[activation](rows[:, :1].float())
    found = cpu.product(rows, packed, activation=activation)
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [33, 48, 97])
def test_numbers_beside_the_result_would_be_overwritten(cpu, dtype, columns):
    rows, weight = random_numbers(9, 16), random_numbers(columns, 16)
    room = torch.full((11, columns), 7.0, dtype=dtype)
    cpu.product(rows, cpu.pack(weight), out=room[1:-1])
    near(room[1:-1], product_of(rows, weight))
    assert (room[0] == 7).all()
    assert (room[-1] == 7).all()


@pytest.mark.parametrize("num_rows", [1, 9, 130])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("biased", [True, False])
def test_a_gated_product_would_differ_from_its_parts(cpu, num_rows, activation, biased):
    rows = random_numbers(num_rows, 18)
    gate, up = random_numbers(49, 18, scale=0.3), random_numbers(49, 18, seed=1, scale=0.3)
    biases = [random_numbers(49, seed=s) if biased else None for s in (2, 3)]
    gated, raised = (
        product_of(rows, weight) + (0 if bias is None else bias.float())
        for weight, bias in zip((gate, up), biases, strict=True)
    )
    kept = [torch.empty(num_rows, 49, dtype=torch.bfloat16) for _ in "gu"]
    packed = [cpu.pack(gate), cpu.pack(up)]
    found = cpu.gated_product(rows, *packed, activation, biases, kept)
    rounded_once(found, ACTIVATIONS[activation](gated) * raised)
    rounded_once(kept[0], gated)
    rounded_once(kept[1], raised)
    assert cpu.gated_product(rows, *packed, activation, biases).equal(found)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inputs", [34, 2060])
def test_a_rows_bits_would_depend_on_its_company_or_the_threads(cpu, threads, inputs):
    rows = random_numbers(300, inputs)
    weights = [random_numbers(97, inputs, seed=s, scale=0.1) for s in (0, 1)]
    packed = [cpu.pack(weight) for weight in weights]
    whole, gated = cpu.product(rows, packed[0]), cpu.gated_product(rows, *packed, "silu")
    with num_threads(threads):
        packed = [cpu.pack(weight) for weight in weights]
        for start, stop in [(0, 300), (0, 1), (299, 300), (127, 129), (3, 12), (100, 260)]:
            part = rows[start:stop].clone()
            assert cpu.product(part, packed[0]).equal(whole[start:stop])
            assert cpu.gated_product(part, *packed, "silu").equal(gated[start:stop])


@pytest.mark.parametrize("shape", [(2, 1), (34, 97), (48, 48), (130, 31)])
def test_a_transposed_weight_would_be_packed_otherwise_than_its_copy(cpu, shape):
    weight, rows = random_numbers(*shape), random_numbers(5, shape[0])
    found = cpu.product(rows, cpu.pack_transposed(weight))
    rounded_once(found, rows.float() @ weight.float())
    if shape[0] % 2 == 0:
        assert found.equal(cpu.product(rows, cpu.pack(weight.t().contiguous())))


def test_a_kept_weight_would_be_overwritten_by_the_next(cpu):
    rows, weights = random_numbers(3, 16), [random_numbers(32, 16, seed=s) for s in range(3)]
    kept = cpu.pack(weights[0])
    here, there = cpu.pack_here(weights[1]), cpu.pack_here(weights[2], room="there")
    for packed, weight in zip((kept, here, there), weights, strict=True):
        rounded_once(cpu.product(rows, packed), product_of(rows, weight))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 15, 129, 2101])
@pytest.mark.parametrize("shape", [(7, 5), (33, 50), (130, 97)])
def test_a_weights_gradient_would_not_be_the_sum_over_rows(cpu, num_rows, shape):
    if num_rows > 2000 and shape[0] > 100:
        pytest.skip("the smaller shapes show the same")
    num_out, num_in = shape
    grad, rows = random_numbers(num_rows, num_out), random_numbers(num_rows, num_in, seed=1)
    before = random_numbers(num_out, num_in, dtype=torch.float32)
    sums = before.clone()
    cpu.add_weight_gradients(grad, rows, [sums])
    expected = before.double() + grad.double().t() @ rows.double()
    near(sums, expected, within=1e-5)
    cpu.add_weight_gradients(grad, rows, [sums])
    near(sums, 2 * expected - before, within=1e-5)


@pytest.mark.parametrize("part", [slice(0, 3), slice(3, 40), slice(40, 41)])
def test_a_part_of_wider_rows_would_be_read_as_if_it_were_dense(cpu, part):
    grad, rows = random_numbers(21, 41), random_numbers(21, 18, seed=1)
    expected = torch.zeros(part.stop - part.start, 18)
    cpu.add_weight_gradients(grad[:, part].contiguous(), rows, [expected])
    room = torch.zeros(len(expected) + 2, 18)
    cpu.add_weight_gradients(grad[:, part], rows, [room[1:-1]])
    assert room[1:-1].equal(expected)
    assert not room[0].any()
    assert not room[-1].any()


def test_a_gradients_bits_would_depend_on_the_threads(cpu):
    grad, rows = random_numbers(300, 150), random_numbers(300, 97)
    sums = [torch.zeros(150, 97) for _ in range(2)]
    for threads, into in enumerate(sums, start=1):
        with num_threads(threads):
            cpu.add_weight_gradients(grad, rows, [into])
    assert sums[0].equal(sums[1])


def test_no_rows_would_add_to_a_gradient(cpu):
    near_by = torch.zeros(64, 64)
    cpu.add_weight_gradients(
        random_numbers(64, 64), random_numbers(64, 64), [near_by]
    )  # leaves its sums on the stack
    sums = torch.zeros(64, 64)
    cpu.add_weight_gradients(random_numbers(0, 64), random_numbers(0, 64), [sums])
    assert not sums.any()
    assert cpu.product(random_numbers(0, 64), cpu.pack(random_numbers(8, 64))).shape == (0, 8)


def test_a_number_that_is_none_would_be_hidden_by_an_activation(cpu):
    packed = cpu.pack(torch.eye(16).bfloat16())
    for activation in ACTIVATIONS:
        rows = torch.full((1, 16), torch.nan).bfloat16()
        assert cpu.product(rows, packed, activation=activation).isnan().all(), activation
