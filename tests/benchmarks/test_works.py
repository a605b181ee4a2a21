"""The list of works: all that the table promises, and what a quick run or a choice leaves of it."""

import pytest

from benchmarks.jobs import config_of
from benchmarks.works import GROUPS, PEERS, all_works, chosen, quick_works
from meshift.config import runs
from meshift.config.loading import make_config

CONFIGS = {
    "sft": runs.SFTRunConfig,
    "reward": runs.RewardRunConfig,
    "dpo": runs.DPORunConfig,
    "ppo": runs.PPORunConfig,
}


def test_the_list_has_every_batch_and_method_that_is_promised():
    works = all_works()
    forced = [w.batch for w in works if w.method == "generation" and not w.natural]
    assert forced == [1, 8, 32, 64, 128]
    assert {w.method for w in works} == {"generation", "inference", "sft", "reward", "dpo", "grpo", "ppo"}
    assert len({w.name for w in works}) == len(works)


def test_a_quick_run_times_one_setting_of_a_peer():
    assert all(len(peer.variants) == 1 for work in quick_works() for peer in work.peers)
    assert {w.name for w in quick_works()} <= {w.name for w in all_works()}


def test_peers_that_were_not_asked_for_do_not_run():
    works = chosen(all_works(), ["generation"], ["vllm"], "cpu")
    assert {p.name for w in works for p in w.peers} == {"vllm"}
    assert all(not w.peers for w in chosen(all_works(), GROUPS, [], "cpu"))


def test_peers_built_for_cpus_do_not_run_on_a_gpu():
    works = chosen(all_works(), GROUPS, PEERS, "cuda")
    assert {p.name for w in works for p in w.peers} == {"transformers", "trl"}


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_our_configs_are_ones_that_meshift_takes(method, tmp_path):
    config = make_config(CONFIGS[method], config_of(method, tmp_path, "model", 8, 16))
    assert config.dtype == "bfloat16"
    assert config.data.batch_size == 8
    assert not config.data.shuffle
