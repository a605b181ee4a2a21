"""Edges follow from keys and weights; whatever does not fit is refused with its name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshift.graph.calls import Graph, GraphError, HostCall, LoopCall, ModelCall, SyncCall


def model(name, role="actor", kind="infer", reads=(), writes=()):
    return ModelCall(name=name, role=role, kind=kind, task=None, reads=tuple(reads), writes=tuple(writes))


def host(name, reads=(), writes=()):
    return HostCall(name=name, function=lambda batch: batch, reads=tuple(reads), writes=tuple(writes))


def ppo_like():
    calls = (
        model("rollout", kind="generate", reads=["prompts"], writes=["tokens", "logprobs"]),
        model("score", role="reward", reads=["tokens"], writes=["scores"]),
        model("reference", role="reference", reads=["tokens"], writes=["ref_logprobs"]),
        model("values", role="critic", reads=["tokens"], writes=["values"]),
        host("advantages", reads=["scores", "values", "logprobs", "ref_logprobs"], writes=["advantages"]),
        model("train_actor", kind="train", reads=["tokens", "advantages"]),
        model("train_critic", role="critic", kind="train", reads=["tokens", "advantages"]),
        SyncCall(name="sync", source="actor", target="reference", rate=0.1),
    )
    return Graph(calls, frozenset({"prompts"}))


def test_edges_of_ppo_are_what_the_paper_says_waits_for_what():
    assert {name: set(waits) for name, waits in ppo_like().edges.items()} == {
        "rollout": set(),
        "score": {"rollout"},
        "reference": {"rollout"},
        "values": {"rollout"},
        "advantages": {"rollout", "score", "reference", "values"},
        "train_actor": {"rollout", "advantages"},
        "train_critic": {"rollout", "advantages", "values"},
        "sync": {"train_actor", "reference"},
    }


def test_ready_offers_what_may_run_at_the_same_time():
    graph = ppo_like()
    assert [c.name for c in graph.ready([])] == ["rollout"]
    assert {c.name for c in graph.ready(["rollout"])} == {"score", "reference", "values"}
    assert {c.name for c in graph.ready(["rollout", "score", "reference", "values", "advantages"])} == {
        "train_actor",
        "train_critic",
    }
    assert graph.ready(graph.edges) == ()


def test_roles_are_listed_once_in_order_of_use():
    assert ppo_like().roles() == ("actor", "reward", "reference", "critic")


def test_a_key_that_nobody_writes_is_named():
    with pytest.raises(GraphError, match="'score' reads 'tokens', which no earlier call writes"):
        Graph((model("score", reads=["tokens"]), model("rollout", writes=["tokens"])), frozenset())


def test_a_key_written_twice_is_named_with_both_writers():
    with pytest.raises(GraphError, match="'b' writes 'x', which 'a' gives"):
        Graph((host("a", writes=["x"]), host("b", writes=["x"])), frozenset())


def test_a_call_must_not_overwrite_an_input():
    with pytest.raises(GraphError, match="'a' writes 'prompts'"):
        Graph((host("a", writes=["prompts"]),), frozenset({"prompts"}))


def loop(name, *calls, reads=(), writes=(), **options):
    inner = Graph(calls, frozenset(reads))
    given = {"feed": lambda batch, outcomes: None, "collect": lambda batch, outcomes: None}
    return LoopCall(name=name, graph=inner, reads=tuple(reads), writes=tuple(writes), **given, **options)


def test_a_loop_waits_for_the_weights_that_its_inner_calls_read():
    greedy = loop("greedy", model("rollout", kind="generate", reads=["prompts"]), reads=["prompts"])
    graph = Graph((model("train", kind="train"), greedy, model("again", kind="train")), frozenset({"prompts"}))
    assert graph.edges["greedy"] == {"train"}
    assert graph.edges["again"] == {"train", "greedy"}
    assert graph.roles() == ("actor",)


def test_what_reads_an_input_waits_for_the_loop_that_replaces_it():
    draw = loop("draw", model("rollout", reads=["prompts"]), reads=["prompts"], writes=["x"], replaces_batch=True)
    graph = Graph((draw, host("reader", reads=["prompts"]), host("other")), frozenset({"prompts"}))
    assert graph.edges["reader"] == {"draw"}
    assert graph.edges["other"] == frozenset()


def test_a_batch_can_be_replaced_only_before_anything_was_made_of_it():
    draw = loop("draw", reads=["prompts"], replaces_batch=True)
    with pytest.raises(GraphError, match="'draw' replaces the step's batch, so it must be the first call"):
        Graph((host("a", reads=["prompts"]), draw), frozenset({"prompts"}))


def test_two_calls_of_one_name_are_refused():
    with pytest.raises(GraphError, match="two calls have the name 'a'"):
        Graph((host("a"), host("a")), frozenset())


@pytest.mark.parametrize(
    ("first", "second", "waits"),
    [
        ("infer", "train", True),  # else the reading would see later weights
        ("train", "infer", True),
        ("train", "train", True),
        ("infer", "infer", False),
        ("generate", "infer", False),
        ("generate", "train", True),
    ],
)
def test_calls_on_one_role_wait_exactly_where_its_weights_change(first, second, waits):
    graph = Graph((model("a", kind=first), model("b", kind=second)), frozenset())
    assert graph.edges["b"] == (frozenset({"a"}) if waits else frozenset())


def test_calls_on_different_roles_do_not_wait_for_weights():
    calls = (model("a", kind="train"), model("b", role="critic", kind="train"))
    assert Graph(calls, frozenset()).edges["b"] == frozenset()


def test_a_sync_waits_for_its_target_to_be_read_and_for_its_source_to_be_trained():
    sync = SyncCall(name="sync", source="actor", target="reference", rate=1.0)
    calls = (model("read", role="reference"), model("train", kind="train"), sync, model("later", role="reference"))
    graph = Graph(calls, frozenset())
    assert graph.edges["sync"] == {"read", "train"}
    assert graph.edges["later"] == {"sync"}


def test_a_sync_does_not_hold_back_readers_of_its_source():
    sync = SyncCall(name="sync", source="actor", target="reference", rate=1.0)
    graph = Graph((sync, model("read"), model("train", kind="train")), frozenset())
    assert graph.edges["read"] == frozenset()
    assert graph.edges["train"] == {"sync", "read"}


@given(st.data())
def test_every_edge_points_backwards_so_that_program_order_is_an_order(data):
    kinds = st.sampled_from(["generate", "infer", "train"])
    roles = st.sampled_from(["actor", "critic"])
    calls, keys = [], ["prompts"]
    for i in range(data.draw(st.integers(1, 6))):
        reads = data.draw(st.lists(st.sampled_from(keys), max_size=2, unique=True))
        calls.append(model(f"c{i}", data.draw(roles), data.draw(kinds), reads, [f"k{i}"]))
        keys.append(f"k{i}")
    graph = Graph(tuple(calls), frozenset({"prompts"}))
    position = {call.name: i for i, call in enumerate(graph.order())}
    assert all(position[wait] < position[name] for name, waits in graph.edges.items() for wait in waits)
