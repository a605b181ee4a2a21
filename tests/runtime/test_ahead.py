"""Completions drawn ahead: which weights draw what, how old tokens may be, and that a queue survives on disk."""

import json

import pytest
import torch
from tiny_ahead import ahead_of
from tiny_policy import graph_of, make_policy_world, policy_config
from tiny_rl import make_world, ppo_config

from meshift.batch import Batch, Outcome, Ragged
from meshift.config.loading import make_config
from meshift.config.policy_runs import RAFTRunConfig
from meshift.config.runs import DPORunConfig, SFTRunConfig
from meshift.errors import CheckpointError, ConfigError, StaleWeightsError
from meshift.graph.ahead import halves_of
from meshift.graph.calls import Graph, GraphError, HostCall, ModelCall, SyncCall
from meshift.runtime.ahead import Queue
from meshift.runtime.staleness import Ages


@pytest.mark.parametrize(
    ("max_staleness", "drawn"),
    [
        (0, [[0], [1], [2], [3], [4]]),
        (1, [[0, 1], [2], [3], [4], []]),
        (2, [[0, 1, 2], [3], [4], [], []]),
        (9, [[0, 1, 2, 3, 4], [], [], [], []]),
    ],
)
def test_every_step_draws_what_the_bound_allows_and_nothing_twice(max_staleness, drawn):
    queue, found = Queue(max_staleness, 5), []
    for step in range(5):
        due = list(queue.due(step))
        for one in due:
            queue.put(one, Outcome(metrics={"drawn_at": step, "perf/x": 1.0}))
        own = queue.take(step)
        assert own.metrics == {"drawn_at": max(0, step - max_staleness)}
        found.append(due)
    assert found == drawn


def test_a_queue_on_disk_would_lose_or_change_a_completion(tmp_path):
    lengths = torch.tensor([3, 1])
    batch = Batch(
        {
            "tokens": Ragged(torch.tensor([1, 2, 3, 4]), lengths),
            "logprobs": Ragged(torch.tensor([-0.1, -1e-30, -3.0, 0.1]), lengths),
            "truncated": Ragged.scalars([True, False]),
        },
        {"column/answer": [{"a": 1.5}, None]},
    )
    queue = Queue(2, 9)
    for step in (0, 1, 2):
        queue.put(step, Outcome(batch=batch.index([step % 2]), metrics={"sampling/num_rounds": 0.1 + step}))
    queue.take(0)
    queue.write(tmp_path)
    other = Queue(2, 9)
    other.read(tmp_path)
    assert list(other.due(1)) == list(queue.due(1)) == [3]
    for step in (1, 2):
        ours, theirs = queue.take(step), other.take(step)
        assert ours.metrics == theirs.metrics
        assert ours.batch.columns == theirs.batch.columns
        for key, ragged in ours.batch.fields.items():
            assert torch.equal(ragged.values, theirs.batch[key].values)
            assert ragged.values.dtype == theirs.batch[key].values.dtype
    (tmp_path / "ahead" / "completions-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="ahead cannot be read"):
        Queue(2, 9).read(tmp_path)


def ages(*starts, max_staleness=2):
    """After steps that began with weights of these versions, on fresh tokens."""
    found = Ages("actor")
    for start in starts:
        found.check(torch.tensor([start]), start, max_staleness)
    return found


def test_a_token_is_as_old_as_the_steps_whose_updates_its_weights_lack():
    """Four updates a step: version 3 was never a step's, but the weights of it lack two steps' updates."""
    metrics = ages(0, 4, 8).check(torch.tensor([4, 4, 8, 12]), 12, 2)
    assert metrics == {"off_policy/staleness_mean": (2 + 2 + 1) / 4, "off_policy/staleness_max": 2.0}
    same = ages(0, 0, 0).check(torch.tensor([0, 0]), 0, 2)
    assert same["off_policy/staleness_max"] == 0.0, "steps without an update make nothing stale"


@pytest.mark.parametrize("versions", [[3], [8, 3], [13]])
def test_a_token_that_is_too_old_or_of_no_weights_is_refused(versions):
    with pytest.raises(StaleWeightsError, match=r"version 12, and of version 4 .* by version \["):
        ages(0, 4, 8).check(torch.tensor(versions), 12, 2)


def test_a_resumed_role_would_forget_how_old_tokens_may_be():
    for known in ([0], [0, 4], [0, 4, 8]):
        before, after = ages(*known), Ages("actor")
        after.load(json.loads(json.dumps(before.values())))
        for one in (before, after):
            one.check(torch.tensor([known[-2] if len(known) > 1 else 0]), 12, 2)
    assert not ages(3, max_staleness=0).values(), "nothing to keep where no step looks back"


def odd(completion_ids):
    return [float(ids[0] % 2) for ids in completion_ids]


@pytest.mark.parametrize("method", ["grpo", "remax"])
def test_completions_are_drawn_by_the_weights_of_the_step_that_the_bound_names(method):
    """By hand: the sampler's log-probs are those of a role that stopped training so many steps before."""
    steps, keys, skipped = 5, {"num_mini_batches": 2, "kl_coef": 0.0}, 0
    config = policy_config(method, max_staleness=2, **{method: keys})
    world = make_policy_world(odd, config, vocab_size=8, max_steps=steps)
    run, snapshots = ahead_of(world, [[1], [2, 3]], 2, steps), []
    actor = world.roles["actor"]
    for step in range(steps):
        snapshots.append({name: p.detach().clone() for name, p in actor.model.named_parameters()})
        outcome = run(step)
        assert set(outcome.batch["versions"].values.tolist()) == {2 * max(0, step - 2)}
        assert outcome.batch["versions"].lengths.tolist() == outcome.batch["logprobs"].lengths.tolist()
        assert outcome.metrics["off_policy/staleness_max"] == min(step, 2)
        assert ("timing_s/rollout" in outcome.metrics) == (step < 3)
        assert ("sync/logprob_diff_max" in outcome.metrics) == (step == 0)
        assert ("off_policy/logprob_diff_max" in outcome.metrics) == (step > 0)
        # What was drawn, read again by the weights of that step.
        now = {name: p.detach().clone() for name, p in actor.model.named_parameters()}
        load(actor, snapshots[max(0, step - 2)])
        reading = next(call for call in world.graph.calls if call.name == "train_actor").task.loss.reading
        again = actor.infer(reading, outcome.batch).batch["new_logprobs"].values
        assert (again - outcome.batch["logprobs"].values).abs().max() < 1e-5
        load(actor, now)
        skipped += outcome.metrics.get("actor/skipped_updates", 0)
    assert actor.version == 2 * steps - skipped


def load(role, weights):
    with torch.no_grad():
        for name, parameter in role.model.named_parameters():
            parameter.copy_(weights[name])


def test_steps_that_draw_what_they_train_on_are_those_without_a_queue():
    """`max_staleness` 0 through the queue, against `run_step`: every bit."""
    found = []
    for through_queue in (False, True):
        world = make_policy_world(odd, policy_config(), vocab_size=8, max_steps=3)
        run = (
            ahead_of(world, [[1], [2, 3]], 0, 3) if through_queue else lambda n, w=world: w.step([[1], [2, 3]], n)
        )
        outcomes = [run(step) for step in range(3)]
        weights = {name: p.detach().clone() for name, p in world.roles["actor"].model.named_parameters()}
        found.append((weights, [outcome.metrics["reward/mean"] for outcome in outcomes], outcomes[-1].batch))
    (one, rewards, batch), (other, theirs, drawn) = found
    assert rewards == theirs
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert batch.fields.keys() == drawn.fields.keys()


def test_a_batch_that_waited_too_long_would_be_trained_on():
    """The role itself refuses it, whoever drew it and whenever."""
    config = policy_config(max_staleness=1)
    world = make_policy_world(odd, config, vocab_size=8, max_steps=4)
    run = ahead_of(world, [[1], [2, 3]], 2, 4)  # one step further ahead than the loss allows
    run(0)
    run(1)
    with pytest.raises(StaleWeightsError, match="staler than may be"):
        run(2)


def test_ppo_learns_from_what_older_weights_drew_with_values_of_now():
    config = ppo_config(
        max_staleness=1,
        ppo={
            "recompute_logprobs": True,
            "importance_correction": "token",
            "num_mini_batches": 2,
            "length_limit_is_end": True,
        },
        generation={"max_completion_length": 4},
    )
    world = make_world(odd, config, vocab_size=8, max_steps=3)
    run = ahead_of(world, [[1], [2, 3], [4], [5]], 1, 3)
    metrics = [run(step).metrics for step in range(3)]
    assert [m["off_policy/staleness_mean"] for m in metrics] == [0.0, 1.0, 1.0]
    assert metrics[0]["off_policy/ratio_mean"] == pytest.approx(1.0, abs=1e-4)
    assert metrics[0]["off_policy/ess"] == pytest.approx(1.0, abs=1e-4)
    assert metrics[1]["off_policy/ess"] < 1.0


def graph_with(*calls):
    return Graph(calls, frozenset(("prompts", "index")))


def call(name, kind, reads, writes=(), role="actor"):
    return ModelCall(name=name, role=role, kind=kind, task=None, reads=reads, writes=writes)


def test_a_graph_that_cannot_be_cut_is_refused():
    with pytest.raises(GraphError, match="no call of the step draws"):
        halves_of(graph_with(call("train", "train", ("prompts",))))
    between = HostCall(name="think", function=lambda batch: batch, reads=("prompts",), writes=("more",))
    with pytest.raises(GraphError, match="reads 'more'"):
        halves_of(graph_with(between, call("draw", "generate", ("prompts", "more"), ("tokens",))))


def test_the_calls_of_every_method_are_cut_after_those_that_draw():
    names = {}
    for method in ("grpo", "dapo", "remax"):
        halves = halves_of(graph_of(policy_config(method)))
        names[method] = [call.name for call in halves.drawing.calls]
        assert not set(names[method]) & {call.name for call in halves.learning.calls}
    assert names == {"grpo": ["rollout"], "dapo": ["sampling"], "remax": ["rollout", "greedy_baseline"]}
    moving = policy_config(reference={"sync_ref_model": True})
    assert any(isinstance(call, SyncCall) for call in halves_of(graph_of(moving)).learning.calls)


def test_a_reference_that_is_read_while_completions_are_drawn_may_not_move():
    values = {
        "output_dir": "unused",
        "data": {"dataset_name": "unused"},
        "actor": {"model_name_or_path": "unused"},
        "reward": {"functions": [{"function": "unused:unused"}]},
        "max_staleness": 1,
        "raft": {"kl_coef": 0.1},
    }
    make_config(RAFTRunConfig, values)
    with pytest.raises(ConfigError, match="take one of the three out"):
        make_config(RAFTRunConfig, {**values, "reference": {"sync_ref_model": True}})


@pytest.mark.parametrize("schema", [SFTRunConfig, DPORunConfig])
def test_a_method_that_draws_nothing_says_so(schema):
    with pytest.raises(ConfigError, match="`max_staleness` is of methods that draw completions"):
        make_config(schema, {"output_dir": "unused", "max_staleness": 1})
