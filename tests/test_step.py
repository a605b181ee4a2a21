"""The step: roles in plain Python show that its sequence is one of all that the graph allows, all equal."""

import pytest
import torch

from meshift.batch import Batch, Outcome, Ragged
from meshift.graph.calls import Graph, HostCall, LoopCall, ModelCall, SyncCall
from meshift.step import run_call, run_step


class FakeRole:
    """A model whose whole weight is one number: what it says depends on it, training and mixing change it."""

    def __init__(self, weight):
        self.weight = weight
        self.version = 0
        self.steps = []

    def generate(self, task, batch):
        return self._say(task, batch)

    def infer(self, task, batch):
        return self._say(task, batch)

    def train(self, task, batch, *, step):
        self.weight += sum(float(value.values.sum()) for value in batch.fields.values()) / 64
        self.version += 1
        self.steps.append(step)
        return Outcome(metrics={f"{task}/loss": self.weight})

    def master_weights(self):
        return {"weight": self.weight}

    def mix(self, source, rate):
        self.weight = rate * source.master_weights()["weight"] + (1 - rate) * self.weight

    def _say(self, task, batch):
        total = sum(value.sum_rows().double() for value in batch.fields.values())
        said = Batch({task: Ragged.scalars(total * self.weight + self.version)})
        return Outcome(batch=said, metrics={f"{task}/mean": float(total.mean())})


def call(name, role, kind, reads, writes=()):
    return ModelCall(
        name=name, role=role, kind=kind, task=writes[0] if writes else name, reads=reads, writes=writes
    )


def difference(batch):
    scores, values = batch["scores"].values, batch["values"].values
    return Outcome(batch=Batch({"advantages": Ragged.scalars(scores - values)}), metrics={"host": 1.0})


def make_graph(every=1):
    calls = (
        call("rollout", "actor", "generate", ("prompts",), ("tokens",)),
        call("score", "reward", "infer", ("tokens",), ("scores",)),
        call("reference", "reference", "infer", ("tokens",), ("ref",)),
        call("values", "critic", "infer", ("tokens",), ("values",)),
        HostCall(name="advantages", function=difference, reads=("scores", "values"), writes=("advantages",)),
        call("train_actor", "actor", "train", ("advantages",)),
        call("train_critic", "critic", "train", ("values", "advantages")),
        SyncCall(name="sync", source="actor", target="reference", rate=0.5, every=every),
    )
    return Graph(calls, frozenset({"prompts"}))


def make_roles():
    return {name: FakeRole(i + 1.0) for i, name in enumerate(("actor", "critic", "reference", "reward"))}


def make_prompts():
    return Batch({"prompts": Ragged.from_rows([[1.0, 2.0], [3.0]], torch.float64)})


def orders(graph, done=()):
    """Every order that `ready` allows."""
    ready = graph.ready(done)
    if not ready:
        yield done
    for next_call in ready:
        yield from orders(graph, (*done, next_call.name))


def run_in_order(graph, order):
    roles, batch = make_roles(), make_prompts()
    calls = {c.name: c for c in graph.calls}
    for name in order:
        batch = batch.union(run_call(calls[name], roles, batch, step=0).batch)
    return roles, batch


def values_of(batch):
    return {key: value.values.tolist() for key, value in batch.fields.items()}


def test_any_order_that_the_graph_allows_ends_with_the_same_batch_and_weights():
    graph, roles = make_graph(), make_roles()
    batch = run_step(graph, roles, make_prompts(), 0).batch
    found = list(orders(graph))
    assert len(found) > 10
    for order in found:
        other_roles, other = run_in_order(graph, order)
        assert values_of(other) == values_of(batch)
        assert {n: r.weight for n, r in other_roles.items()} == {n: r.weight for n, r in roles.items()}


def test_an_order_that_the_graph_forbids_would_show():
    """The test above could not fail if the fake roles did not feel the order."""
    graph = make_graph()
    batch = run_step(graph, make_roles(), make_prompts(), 0).batch
    early_sync = ["rollout", "sync", *(c.name for c in graph.calls if c.name not in ("rollout", "sync"))]
    assert values_of(run_in_order(graph, early_sync)[1]) != values_of(batch)


def test_calls_see_only_the_keys_they_declare():
    seen = []
    spy = HostCall(name="spy", function=lambda b: seen.append(set(b.fields)) or Outcome(), reads=("prompts",))
    batch = make_prompts().union(Batch({"secret": Ragged.scalars([1.0, 2.0])}))
    run_step(Graph((spy,), frozenset({"prompts", "secret"})), {}, batch, 0)
    assert seen == [{"prompts"}]


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), (3, [2, 5])])
def test_a_sync_acts_on_every_nth_step_only(every, expected):
    graph = Graph((SyncCall(name="sync", source="a", target="b", rate=0.5, every=every),), frozenset())
    acted = []
    for step in range(6):
        roles = {"a": FakeRole(2.0), "b": FakeRole(0.0)}
        run_step(graph, roles, Batch({}), step)
        if roles["b"].weight == 1.0:
            acted.append(step)
        assert roles["a"].weight == 2.0
    assert acted == expected


def test_training_is_told_which_step_it_is():
    graph, roles = make_graph(), make_roles()
    for step in range(3):
        run_step(graph, roles, make_prompts(), step)
    assert roles["actor"].steps == [0, 1, 2]
    assert roles["actor"].version == 3
    assert roles["reward"].version == 0


def test_every_call_is_timed_announced_and_its_metrics_kept():
    graph, heard = make_graph(), []
    metrics = run_step(graph, make_roles(), make_prompts(), 0, on_call=heard.append).metrics
    assert heard == [c.name for c in graph.calls]
    assert {f"timing_s/{name}" for name in heard} <= set(metrics)
    assert all(metrics[f"timing_s/{name}"] >= 0 for name in heard)
    assert {"tokens/mean", "host", "train_actor/loss", "train_critic/loss"} <= set(metrics)


def make_loop(num_rounds, **options):
    """Each round feeds the prompts once more; the outcome has the tokens of the last round, or of all."""

    def collect(batch, outcomes):
        kept = Batch.concat([o.batch for o in outcomes]) if options else outcomes[-1].batch.select(("tokens",))
        return Outcome(batch=kept, metrics={"num_rounds": len(outcomes)})

    inner = Graph((call("rollout", "actor", "generate", ("prompts",), ("tokens",)),), frozenset({"prompts"}))
    return LoopCall(
        name="draw",
        graph=inner,
        feed=lambda batch, outcomes: batch if len(outcomes) < num_rounds else None,
        collect=collect,
        reads=("prompts",),
        writes=("tokens",),
        **options,
    )


def test_a_loop_runs_its_graph_until_it_is_fed_no_more_and_is_heard_within():
    score = call("score", "reward", "infer", ("tokens",), ("scores",))
    graph, heard = Graph((make_loop(3), score), frozenset({"prompts"})), []
    outcome = run_step(graph, make_roles(), make_prompts(), 0, on_call=heard.append)
    assert heard == ["draw", "rollout", "rollout", "rollout", "score"]
    assert outcome.metrics["num_rounds"] == 3
    plain = run_step(make_graph(), make_roles(), make_prompts(), 0)
    assert values_of(outcome.batch) == values_of(plain.batch.select(("prompts", "tokens", "scores")))


def test_a_loop_that_replaces_the_batch_leaves_no_row_of_the_old_one():
    score = call("score", "reward", "infer", ("tokens",), ("scores",))
    graph = Graph((make_loop(2, replaces_batch=True), score), frozenset({"prompts"}))
    batch = run_step(graph, make_roles(), make_prompts(), 0).batch
    assert batch["prompts"].values.tolist() == [1.0, 2.0, 3.0] * 2
    assert len(batch["scores"]) == 4


def test_the_batch_that_came_in_is_left_as_it_was():
    prompts = make_prompts()
    run_step(make_graph(), make_roles(), prompts, 0)
    assert set(prompts.fields) == {"prompts"}
    assert prompts["prompts"].values.tolist() == [1.0, 2.0, 3.0]
