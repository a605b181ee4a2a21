"""What leaves a device gives its memory free and comes back with the same bits, for everybody who holds it."""

import torch

from meshift.training.offload import Offload


def model_and_optimizer():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).bfloat16()
    masters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=0.1, fused=True)
    for master in masters:
        master.grad = torch.randn_like(master)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return model, masters, optimizer


def moments(optimizer):
    return [v for state in optimizer.state.values() for v in state.values()]


def test_memory_is_freed_and_filled_with_the_same_bits():
    model, masters, optimizer = model_and_optimizer()
    kept = [*model.parameters(), *masters, *moments(optimizer)]
    offload = Offload(tensors=lambda: kept, blanks=lambda: [m.grad for m in masters])
    before = [t.detach().clone() for t in kept]
    view = masters[0].detach()[1:3]
    for _ in range(2):
        offload.leave()
        assert offload.is_away
        assert all(t.untyped_storage().nbytes() == 0 for t in [*kept, *(m.grad for m in masters)])
        expected = sum(t.nbytes for t in kept) + sum(m.grad.nbytes for m in masters)
        assert offload.num_bytes_away == expected
        offload.leave()  # once is enough
        offload.come()
        offload.come()
        assert not offload.is_away
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, before, strict=True))
        assert not any(m.grad.any() for m in masters)
        assert torch.equal(view, before[len(list(model.parameters()))][1:3])
    assert offload.moved.num_bytes == 4 * sum(t.nbytes for t in kept)


def test_training_goes_on_as_if_nothing_had_left():
    (_, ours, optimizer), (_, theirs, other) = model_and_optimizer(), model_and_optimizer()
    offload = Offload(tensors=lambda: [*ours, *moments(optimizer)], blanks=lambda: [m.grad for m in ours])
    for step in range(3):
        offload.leave()
        offload.come()
        for mine, its in zip(ours, theirs, strict=True):
            gradient = torch.full_like(its, 0.1 * (step + 1))
            mine.grad.add_(gradient)
            its.grad.add_(gradient)
        for one in (optimizer, other):
            one.step()
            one.zero_grad(set_to_none=False)
    assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))


def test_new_numbers_leave_too():
    numbers = torch.arange(6.0)
    offload = Offload(tensors=lambda: [numbers])
    for value in (3.0, 5.0):
        numbers.data.fill_(value)  # which no version counts
        offload.leave()
        offload.come()
        assert numbers.eq(value).all()


def test_two_views_of_one_storage_leave_once():
    whole = torch.arange(10.0)
    offload = Offload(tensors=lambda: [whole[:5], whole[5:], torch.empty(0)])
    offload.leave()
    assert offload.num_bytes_away == 40
    offload.come()
    assert torch.equal(whole, torch.arange(10.0))
