"""A run over the nodes of a Ray cluster is the run of a local gang, whoever of its processes and nodes is lost."""

import math
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from ray_clusters import TwoNodes, actors, descendants
from safetensors.torch import load_file

from meshift.config.loading import dump_config
from meshift.config.plan import LaunchConfig
from meshift.errors import ConfigError, DataError, LostWorkerError, StoppedRunError, WorkerError
from meshift.layout.mesh import Mesh
from meshift.runtime.launch.outpost import Surroundings
from meshift.runtime.launch.watch import Limits
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import run_ppo

# Not imported here: Ray reads how open it is to be when it is imported.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="needs meshift[ray]")]

ROOT = Path(__file__).parents[3]
PLAN = {
    "actor": {"generate": {"mesh": "0-3", "layout": "d4"}, "train": {"mesh": "0-3", "layout": "d2t2"}},
    "critic": {"train": {"mesh": "1-2", "layout": "t2"}},
    "reference": {"infer": {"mesh": "2,0", "layout": "d2"}},
}
NAMED = {
    "actor": {
        "generate": {"mesh": "alpha:0-1,beta:0-1", "layout": "d4"},
        "train": {"mesh": "alpha:0-1,beta:0-1", "layout": "d2t2"},
    },
    "critic": {"train": {"mesh": "alpha:1,beta:0", "layout": "t2"}},
    "reference": {"infer": {"mesh": "beta:0,alpha:0", "layout": "d2"}},
}
MEMORY = {
    "reference": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2},
    "ppo": {"num_mini_batches": 2, "value_norm": "ema", "adaptive_kl": True, "kl_target": 0.1, "kl_horizon": 20},
}


class Breaker(SilentObserver):
    """Does something to the run, once, when a call of a step begins."""

    def __init__(self, step=-1, call="none", deed=lambda: None):
        self.when, self.deed, self.done = (step, call), deed, None
        self.messages, self.calls, self.answers = [], [], {}

    def on_message(self, text):
        self.messages.append((time.monotonic(), text))
        for words in [words for words in self.answers if words in text]:
            self.answers.pop(words)()

    def on_call(self, step, name):
        self.calls.append((time.monotonic(), step, name))
        if (step, name) == self.when and self.done is None:
            self.done = time.monotonic()
            self.deed()

    def heard(self, *words):
        return [text for _, text in self.messages if all(word in text for word in words)]


@pytest.fixture(scope="module")
def two_nodes():
    nodes = TwoNodes()
    yield nodes
    nodes.close()


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    yield
    deadline = time.monotonic() + 10
    while actors() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not actors()


@pytest.fixture(scope="module")
def make_config(ppo_config_on_disk, actor_folder):
    smooth = {"learning_rate": 0.01, "adam_epsilon": 1e-3}

    def make(output_dir, **sections):
        actor = {"model_name_or_path": str(actor_folder), "logits_chunk": 5, **smooth}
        defaults = {"actor": actor, "critic": smooth, "max_steps": 4, "save_steps": 1, "plan": PLAN}
        return ppo_config_on_disk(output_dir, **defaults | MEMORY | sections)

    return make


def on_ray(nodes, **given):
    return {"launcher": "ray", "ray_address": nodes.address, "ray_wait_s": 60, **given}


@pytest.fixture(scope="module")
def local(make_config, tmp_path_factory):
    """The run of a local gang, not broken off."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run_ppo(make_config(folder), SilentObserver())
    return folder


def same_bits(one, other):
    for folder in ("final", "final_critic"):
        ours, theirs = (load_file(run / folder / "model.safetensors") for run in (one, other))
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert ours[name].equal(weight), f"{folder}: {name}"


def kill_a_worker():
    os.kill(max(actors_named("Worker")), signal.SIGKILL)


def actors_named(name):
    return [pid for pid, words in actors().items() if words.startswith(f"ray::{name}")]


@pytest.mark.parametrize("plan", [PLAN, NAMED], ids=["numbers", "hosts"])
def test_two_nodes_would_write_other_than_one_machine(two_nodes, make_config, local, tmp_path, read_lines, plan):
    run = tmp_path / "run"
    breaker = Breaker()
    run_ppo(make_config(run, launch=on_ray(two_nodes), plan=plan), breaker)
    same_bits(run, local)
    for name in ("metrics.jsonl", "samples.jsonl"):
        ours, theirs = read_lines(run / name), read_lines(local / name)
        assert len(ours) == len(theirs) > 0
        for one, other in zip(ours, theirs, strict=True):
            proofs = ("sync/verify_seconds", "sync/probe_seconds")
            timed = ("timing_s/", "perf/", "start_s/", "sync/seconds", *proofs)
            assert {k: v for k, v in one.items() if not k.startswith(timed)} == {
                k: v for k, v in other.items() if not k.startswith(timed)
            }


@pytest.mark.parametrize("call", ["rollout", "train_actor"])
def test_a_killed_worker_would_change_the_final_weights(two_nodes, make_config, local, tmp_path, call):
    breaker = Breaker(2, call, kill_a_worker)
    run_ppo(make_config(tmp_path / "run", launch=on_ray(two_nodes)), breaker)
    assert breaker.heard("was killed on ", "starting again")
    assert breaker.heard("going on after step 2")
    same_bits(tmp_path / "run", local)


@pytest.mark.parametrize("spare", [True, False], ids=["spare", "late"])
def test_a_lost_node_would_end_the_run(two_nodes, make_config, local, tmp_path, spare):
    """The run goes on on a node that is there already, or waits for one that comes."""
    if spare:
        two_nodes.add("gamma")
    breaker = Breaker(2, "train_actor", lambda: two_nodes.kill("beta"))
    breaker.answers["waiting for up to 60 s"] = lambda: two_nodes.add("gamma")
    try:
        run_ppo(make_config(tmp_path / "run", launch=on_ray(two_nodes)), breaker)
    finally:
        two_nodes.kill("gamma")
        two_nodes.add("beta")
    # Ray may not know yet that it was the whole node, nor, when the run begins again, that it is not to be used.
    assert breaker.heard(" beta", "starting again")
    assert spare or breaker.heard("waiting for up to 60 s")
    assert breaker.heard("going on after step 2")
    same_bits(tmp_path / "run", local)


def test_a_stopped_worker_would_be_waited_for(two_nodes, make_config, local, tmp_path):
    breaker = Breaker(1, "rollout", lambda: os.kill(max(actors_named("Worker")), signal.SIGSTOP))
    run_ppo(make_config(tmp_path / "run", launch=on_ray(two_nodes, heartbeat_timeout_s=5)), breaker)
    assert breaker.heard("not been heard for", "stopped on ", "starting again")
    report = (tmp_path / "run" / "hang_report.txt").read_text()
    assert all(f"process {rank}: " in report for rank in range(4))
    same_bits(tmp_path / "run", local)


def test_a_run_without_its_devices_would_wait_for_ever(two_nodes, make_config, tmp_path):
    plan = {"actor": {"train": {"mesh": "0-4", "layout": "d5"}}}
    launch = on_ray(two_nodes, ray_wait_s=1)
    with pytest.raises(WorkerError, match=r"alpha \(2\), beta \(2\).*; the run waited 1 s .* for 5 devices"):
        run_ppo(make_config(tmp_path / "run", plan=plan, launch=launch), SilentObserver())
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".meshift-*"))


def test_a_bounded_number_of_restarts_is_all(two_nodes, make_config, tmp_path):
    breaker = Breaker(0, "rollout", kill_a_worker)
    with pytest.raises(LostWorkerError, match=r"was killed on \w+ .*; the run has ended"):
        run_ppo(make_config(tmp_path / "run", launch=on_ray(two_nodes, max_restarts=0)), breaker)


def test_no_cluster_at_the_address_is_one_sentence(two_nodes, make_config, tmp_path):
    launch = on_ray(two_nodes, ray_address="127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"`launch\.ray_address` is 127\.0\.0\.1:1, and Ray could not be joined"):
        run_ppo(make_config(tmp_path / "run", launch=launch), SilentObserver())


def run_members(nodes, entry, limits=None, observer=None, *, mesh="1-2", shared=(), **settings):
    """A function of `gang_members` in a process on each node."""
    from meshift.runtime.launch.ray_gang import run_on_ray

    return run_on_ray(
        LaunchConfig(**on_ray(nodes, **settings)),
        Mesh.parse(mesh),
        (f"gang_members:{entry}", "2"),
        Surroundings(directory=os.getcwd(), variables={}, modules=tuple(sys.path), shared=shared, token=None),
        observer or SilentObserver(),
        limits or Limits(),
    )


def test_processes_that_wait_for_each_other_would_do_so_for_ever(two_nodes):
    with pytest.raises(LostWorkerError, match="no process of the run has gone on for 2 s") as caught:
        run_members(two_nodes, "wait_for_ever", Limits(hang_s=2.5))
    report = caught.value.report
    assert "in step 5, call train_critic" in report
    assert "in step 5, call train_actor" in report
    assert " on alpha; " in report
    assert " on beta; " in report
    assert report.count("in wait_for_ever") == 2, "both stacks are in it"


def test_errors_keep_their_class_and_accidents_their_traceback(two_nodes):
    with pytest.raises(DataError, match=r"^rows\.jsonl:3 is no row$"):
        run_members(two_nodes, "refuse")
    breaker = Breaker()
    with pytest.raises(WorkerError, match=r"process 1 of the run failed on beta \(its traceback stands above\)"):
        run_members(two_nodes, "crash", observer=breaker)
    assert breaker.heard("an accident", "gang_members.py")


def test_a_node_that_does_not_see_the_model_is_named(two_nodes):
    with pytest.raises(ConfigError, match=r"the node alpha does not see /no/model as this machine does"):
        run_members(two_nodes, "add_up", shared=("/no/model",))


def test_sigterm_would_not_be_heard_while_devices_are_waited_for(two_nodes):
    breaker = Breaker()
    breaker.answers["waiting for up to 60 s"] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StoppedRunError, match="was waiting for devices"):
        run_members(two_nodes, "add_up", observer=breaker, mesh="gamma:0")


def begin(config, folder, until):
    """`meshift ppo` in a process of its own, which has written as many steps when this returns."""
    file = folder / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    words = [sys.executable, "-m", "meshift.cli.main", "ppo", "--config", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    metrics, deadline = Path(config.output_dir) / "metrics.jsonl", time.monotonic() + 180
    while not metrics.is_file() or len(metrics.read_bytes().splitlines()) < until:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_the_end_of_the_command_would_leave_actors_behind(two_nodes, make_config, local, tmp_path, number, code):
    run = tmp_path / "run"
    config = make_config(run, launch=on_ray(two_nodes), save_steps=None, max_steps=40)
    with begin(config, tmp_path, 1) as process:
        process.send_signal(number)
        said = process.stderr.read()
        assert process.wait(60) == code, said
    if number == signal.SIGTERM:
        assert "--resume goes on from" in said
        done = int((run / "LATEST").read_text().rpartition("-")[2])
        assert done < 40


def test_a_private_cluster_would_be_open_to_others(make_config, local, tmp_path):
    """Without an address Ray is this machine's alone: on loopback, and gone with the run."""
    run = tmp_path / "run"
    before = set(Path("/tmp").glob("meshift-*"))
    with begin(make_config(run, launch={"launcher": "ray"}), tmp_path, 1) as process:
        family = {process.pid, *descendants(process.pid)}
        heard = listeners(family)
        said = process.stderr.read()
        assert process.wait(120) == 0, said
    assert heard
    assert all(address in ("127.0.0.1", "::ffff:127.0.0.1") for address in heard), heard
    same_bits(run, local)
    assert set(Path("/tmp").glob("meshift-*")) <= before


def listeners(pids):
    """The addresses that these processes listen on."""
    import psutil

    return {
        c.laddr.ip
        for pid in pids
        if psutil.pid_exists(pid)
        for c in psutil.Process(pid).net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }


def test_metrics_of_the_local_run_are_numbers(local, read_lines):
    """Else the comparison above would hold anything equal."""
    assert all(math.isfinite(row["actor/grad_norm"]) for row in read_lines(local / "metrics.jsonl"))
