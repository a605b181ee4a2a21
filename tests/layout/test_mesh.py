"""Meshes: what is written is what is read, and what is wrong is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshift.errors import LayoutError
from meshift.layout.mesh import Device, Mesh

HOSTS = st.sampled_from(["node0", "node1", "10.0.0.1", "a-b.example"])


def device_lists(hosts):
    devices = st.builds(Device, host=hosts, index=st.integers(0, 20))
    return st.lists(devices, min_size=1, max_size=12, unique=True)


@given(devices=st.one_of(device_lists(st.just("")), device_lists(HOSTS)))
def test_a_mesh_reads_back_as_it_was_written(devices):
    mesh = Mesh(devices=tuple(devices))
    assert Mesh.parse(str(mesh)) == mesh
    assert [mesh.rank_of(device) for device in devices] == list(range(len(mesh)))
    assert mesh.hosts == tuple(device.host for device in devices)


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("0-3", "0-3"),
        (0, "0"),
        ("0,2,5", "0,2,5"),
        ("0, 1, 2", "0-2"),
        ("3,2", "3,2"),
        ("node0:0-3", "node0:0-3"),
        ("node0:0,1,3,node1:4", "node0:0-1,3,node1:4"),
        ("node1:0,node1:1", "node1:0-1"),
    ],
)
def test_the_forms_that_a_config_may_use_mean_what_they_say(text, written):
    assert str(Mesh.parse(text)) == written


def test_numbers_without_a_host_count_through_the_cluster():
    mesh = Mesh.parse("6-9,0", {"a": 8, "b": 8})
    assert str(mesh) == "a:6-7,b:0-1,a:0"
    assert str(Mesh.parse("b:0-1", {"a": 8, "b": 8})) == "b:0-1"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "`` where a number"),
        ("0-", "`0-` where a number"),
        ("x", "`x` where a number"),
        ("-1", "`-1` where a number"),
        ("0,,1", "`` where a number"),
        ("3-1", "ranges go upwards"),
        ("0-99999999", "ranges go upwards"),
        ("0-2,1", "names the device 1 twice"),
        (":3", "a colon without a host"),
        ("0,node0:1", "devices without a host"),
    ],
)
def test_a_mesh_that_is_badly_written_is_refused_by_name(text, says):
    with pytest.raises(LayoutError, match=says):
        Mesh.parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("16", "there are 16"),
        ("b:8", "b has 8"),
        ("c:0", "names the host c; hosts are a, b"),
        ("7-16", "there are 16"),
    ],
)
def test_a_device_that_the_cluster_lacks_is_refused_by_name(text, says):
    with pytest.raises(LayoutError, match=says):
        Mesh.parse(text, {"a": 8, "b": 8})


def test_a_mesh_needs_a_device():
    with pytest.raises(LayoutError, match="no device"):
        Mesh(devices=())
