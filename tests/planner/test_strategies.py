"""Plans by hand have their best chance: every way to share out the devices is tried, for any number of roles."""

from dataclasses import replace
from itertools import product

import pytest
from tiny_steps import device, llama, problem, step, texts

from meshift.planner.candidates import Problem
from meshift.planner.search import score
from meshift.planner.strategies import _best, _groups, split_by_role
from meshift.planner.uses import Use


def with_cost():
    """PPO with a critic of costs too: five groups of calls."""
    given = step("ppo")
    roles = {**given.roles, "cost_critic": replace(given.roles["critic"], name="cost_critic")}
    twice = [
        replace(
            call, name=call.name.replace("values", "costs").replace("critic", "cost_critic"), role="cost_critic"
        )
        for call in given.calls
        if call.role == "critic"
    ]
    return replace(given, roles=roles, calls=(*given.calls, *twice))


def test_more_groups_than_four_are_split_and_more_than_devices_are_not():
    given = Problem(with_cost(), device(), 6, sharding=False)
    choice = split_by_role(given)
    assert choice is not None
    meshes = {use.role + use.kind * (use.kind == "generate"): (s.first, s.stop) for use, s in choice.items()}
    assert len(set(meshes.values())) == 5
    assert split_by_role(Problem(with_cost(), device(), 4)) is None


@pytest.mark.parametrize("largest", ["actor", "critic"])
def test_the_role_that_takes_longest_may_have_most_devices_whichever_it_is(largest):
    sizes = {largest: llama(layers=8)}
    given = problem("ppo", 8, device(memory=64), given=texts(completion=16.0, most=32), sharding=False, **sizes)
    groups = _groups(given)
    assert len(groups) == 4
    found = score(given, split_by_role(given))
    for shares in (one for one in product(range(1, 6), repeat=4) if sum(one) == 8):
        areas = {
            use: (n, sum(shares[:i]))
            for i, (n, group) in enumerate(zip(shares, groups, strict=True))
            for use in group
        }
        assert found <= score(given, _best(given, areas)), shares
    train = split_by_role(given)[Use(largest, "train")]
    assert train.candidate.size > 2
