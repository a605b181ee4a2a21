"""A keeper and its processes, without the software of any cluster: each is a process of this machine."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import asdict

import pytest

from meshift.runtime.launch.member import Post, interface_of
from meshift.runtime.launch.outpost import Keeper, Surroundings, Worker


@pytest.fixture
def keeper():
    keeper = Keeper(silence_s=600)
    yield keeper
    keeper.end()


def surroundings(folder, **given):
    values = {"directory": str(folder), "variables": {}, "modules": (), "shared": (), "token": None}
    return json.dumps(asdict(Surroundings(**values | given)))


def work(conn, around, entry, rank, folder):
    worker = Worker()
    port = worker.enter(around, None if rank else "127.0.0.1")
    if rank == 0:
        conn.send(port)
    post = Post(
        entry=entry,
        argument="2",
        rank=rank,
        num_processes=2,
        num_threads=1,
        timeout_s=30,
        folder=folder,
        meeting=("127.0.0.1", port or conn.recv()),
        host="127.0.0.1",
    )
    os._exit(worker.run(json.dumps(asdict(post))))


@pytest.fixture
def two_workers(keeper, tmp_path):
    """`two_workers(entry)` starts them under the keeper; they are gone after the test."""
    context = multiprocessing.get_context("forkserver")
    processes = []

    def start(entry):
        _, folder, _, _ = json.loads(keeper.enter(surroundings(tmp_path)))
        mine, theirs = context.Pipe()
        around = surroundings(tmp_path, modules=(os.path.dirname(__file__),))
        for rank in range(2):
            process = context.Process(target=work, args=(theirs, around, entry, rank, folder))
            process.start()
            processes.append(process)
            if rank == 0:
                mine.send(mine.recv())
        return processes

    here = os.getcwd()
    yield start
    os.chdir(here)
    for process in processes:
        process.kill()
        process.join()


def hear_until(keeper, is_enough):
    said, deadline = [], time.monotonic() + 60
    while not is_enough(said) and time.monotonic() < deadline:
        said += json.loads(keeper.hear(0.5))
    return said


def test_processes_meet_at_a_port_and_are_heard_until_they_close(keeper, two_workers):
    two_workers("gang_members:add_up")
    said = hear_until(keeper, lambda said: sum(text is None for _, text in said) == 2)
    messages = [(rank, *json.loads(text)) for rank, text in said if text is not None]
    assert [content for rank, what, content in messages if (rank, what) == (0, "returned")] == [[2, 5.0]]
    assert sorted(content for _, what, content in messages if what == "on_message") == [
        ["here is 0"],
        ["here is 1"],
    ]


def test_a_stopped_process_is_seen_and_killed(keeper, two_workers):
    processes = two_workers("gang_members:stop_itself")
    hear_until(keeper, lambda said: sum(text is not None and "rollout" in text for _, text in said) >= 3)
    seen = until_stopped(keeper)
    assert seen[1][0] == "stopped"
    assert "stop_itself" in seen[0][1], "its stack"
    keeper.end()
    for process in processes:
        process.join(10)
        assert process.exitcode == -signal.SIGKILL


def until_stopped(keeper):
    deadline = time.monotonic() + 20
    while True:
        seen = {rank: (state, stacks) for rank, state, stacks in json.loads(keeper.look())}
        if seen[1][0] == "stopped" or time.monotonic() > deadline:
            return seen


def test_sigterm_reaches_the_process_that_is_meant(keeper, two_workers):
    two_workers("gang_members:wait_for_term")
    hear_until(keeper, lambda said: any(text is not None and "ready" in text for _, text in said))
    keeper.terminate(0)
    said = hear_until(keeper, lambda said: any(rank == 0 and "returned" in (text or "") for rank, text in said))
    assert [0, json.dumps(["returned", [signal.SIGTERM]])] in said


def forget(conn, silence_s):
    keeper = Keeper(silence_s)
    conn.send(keeper._folder)
    keeper.hear(0)
    time.sleep(60)


def test_a_keeper_that_nobody_asks_would_stay_for_ever():
    context = multiprocessing.get_context("forkserver")
    mine, theirs = context.Pipe()
    process = context.Process(target=forget, args=(theirs, 1.0))
    process.start()
    folder = mine.recv()
    process.join(20)
    assert process.exitcode == 1
    assert not os.path.exists(folder)


@pytest.fixture
def seen_from(tmp_path):
    here = os.getcwd()
    yield lambda **given: Surroundings(
        **json.loads(surroundings(given.pop("folder", tmp_path), **given))
    ).missing()
    os.chdir(here)


def test_a_node_that_does_not_see_the_files_would_fail_in_the_middle(seen_from, tmp_path):
    file = tmp_path / "token"
    file.write_text("as it should be", encoding="ascii")
    assert seen_from(shared=(str(file),), token=(str(file), "as it should be")) is None
    assert seen_from(folder="/there/is/none") == "/there/is/none"
    assert seen_from(shared=("/no/model",)) == "/no/model"
    assert seen_from(token=(str(file), "another")) == str(tmp_path), "a folder of the same name is not the same"
    assert seen_from(token=(str(tmp_path / "gone"), "x")) == str(tmp_path)


def test_the_interface_of_an_address_is_found():
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("198.51.100.77") is None
