"""A Ray cluster of two nodes on this machine, for tests: on loopback, with a token, in a folder of its own."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

from meshift.runtime.launch.launcher import keep_private

SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False, "num_cpus": 2}


class TwoNodes:
    """`alpha`, with Ray's head, and `beta`, each with two devices."""

    def __init__(self):
        keep_private()
        import ray._private.utils
        from ray.cluster_utils import Cluster

        # It would tell every process of the machine that this cluster is the one to join.
        ray._private.utils.write_ray_address = lambda *given: None
        self.folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a longer path would be too long for sockets
        head = {**SMALL, "node_name": "alpha", "temp_dir": self.folder}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self.cluster.address
        self.nodes = {"alpha": self.cluster.head_node}
        self.add("beta")

    def add(self, name):
        self.nodes[name] = self.cluster.add_node(**SMALL, node_name=name)

    def kill(self, name):
        """As when a machine loses its power: the node's daemon and all of its processes, at once."""
        raylet = self.nodes.pop(name).all_processes["raylet"][0].process
        for pid in [raylet.pid, *descendants(raylet.pid)]:
            os.kill(pid, signal.SIGKILL)
        raylet.wait()

    def close(self):
        self.cluster.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)


def descendants(pid):
    """Children of a process, and theirs."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def actors():
    """Live processes of a run's actors: Ray names a process after its class."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if words.startswith(("ray::Worker", "ray::Keeper")):
            found[int(folder.name)] = words.partition("\0")[0]
    return found
