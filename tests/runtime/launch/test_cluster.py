"""Which device is whose does not depend on who tells of the nodes, or in what order."""

import pytest

from meshift.errors import LayoutError
from meshift.layout.mesh import Mesh
from meshift.runtime.launch.cluster import nodes_of, seats


def row(name, *, node_id=None, alive=True, **resources):
    return {
        "NodeID": node_id or f"id-{name}",
        "NodeName": name,
        "NodeManagerAddress": "10.0.0.1",
        "Alive": alive,
        "Resources": {"CPU": 8.0, **resources},
    }


def names(mesh, nodes):
    return [node.name for node in seats(Mesh.parse(mesh), nodes)]


def test_nodes_are_counted_by_the_numbers_in_their_names_and_without_the_dead():
    kind, nodes = nodes_of([row("n10"), row("n2"), row("n1", alive=False), row("head", CPU=0)])
    assert kind == "CPU"
    assert [str(node) for node in nodes] == ["n2 (8)", "n10 (8)"]


def test_a_node_without_a_gpu_would_be_given_a_share_beside_nodes_with_some():
    kind, nodes = nodes_of([row("a"), row("b", GPU=4.0)])
    assert kind == "GPU"
    assert [str(node) for node in nodes] == ["b (4)"]


def test_numbers_count_through_the_nodes_and_hosts_are_found_by_name():
    _, nodes = nodes_of([row("b", CPU=2), row("a", CPU=2)])
    assert names("0-3", nodes) == ["a", "a", "b", "b"]
    assert names("1-2", nodes) == ["a", "b"]
    assert names("b:0-1,a:1", nodes) == ["b", "b", "a"]


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        ("0-4", "names the device 4, but there are 4; they count from 0"),
        ("c:0", "names the host c; hosts are a, b"),
        ("a:2", "names the device a:2, but a has 2"),
    ],
)
def test_devices_that_are_not_there_are_named(mesh, sentence):
    _, nodes = nodes_of([row("a", CPU=2), row("b", CPU=2)])
    with pytest.raises(LayoutError, match=sentence):
        seats(Mesh.parse(mesh), nodes)


def test_two_nodes_of_one_name_would_be_taken_for_one():
    _, nodes = nodes_of([row("a", node_id="1", CPU=2), row("a", node_id="2", CPU=2)])
    assert [node.id for node in seats(Mesh.parse("0-3"), nodes)] == ["1", "1", "2", "2"]
    with pytest.raises(LayoutError, match="two nodes are called a; start each with a `--node-name` of its own"):
        seats(Mesh.parse("a:0"), nodes)
