"""What a run holds is counted per role, and held against the machine in a sentence."""

import pytest

from meshift.config.loading import make_config
from meshift.config.runs import DPORunConfig
from meshift.models.hf.load import load_model
from meshift.runtime.machine import Memory, machine_memory
from meshift.runtime.memory import held_bytes, held_models, memory_verdict


def parameters(folder, head):
    return sum(p.numel() for p in load_model(folder, head=head).parameters())


def test_a_ppo_run_counts_each_role_and_the_optimizer_of_those_it_trains(
    ppo_config_on_disk, actor_folder, reward_folder, tmp_path
):
    """fp32: 4 bytes for weights, and 12 more for gradients and two moments."""
    config = ppo_config_on_disk(tmp_path)
    held = held_models(config)
    assert [(one.role, one.head, one.trained is not None) for one in held] == [
        ("actor", "lm", True),
        ("critic", "value", True),
        ("reference", "lm", False),
        ("reward", "reward", False),
    ]
    lm, scored = parameters(actor_folder, "lm"), parameters(reward_folder, "reward")
    assert held_bytes(config, held) == 16 * lm + 16 * scored + 4 * lm + 4 * scored


def test_dpo_holds_its_reference_unless_it_was_read_beforehand(actor_folder, tmp_path):
    def roles(**dpo):
        values = {"output_dir": str(tmp_path), "data": {"dataset_name": "x"}, "dpo": dpo}
        config = make_config(DPORunConfig, {**values, "actor": {"model_name_or_path": str(actor_folder)}})
        return [(one.role, one.name) for one in held_models(config)]

    assert roles() == [("actor", str(actor_folder)), ("reference", str(actor_folder))]
    assert roles(precompute_ref_log_probs=True) == [("actor", str(actor_folder))]


@pytest.mark.parametrize(
    ("needed", "fits", "words"),
    [
        (5 * 10**9, True, "5.00 GB for weights, gradients and optimizers, of 8.00 GB free"),
        (7 * 10**9, True, "may not fit"),
        (11 * 10**9, False, "this machine has 10.00 GB: it will not fit"),
    ],
)
def test_the_sentence_says_whether_it_fits(needed, fits, words):
    memory = Memory(device="this machine", total=10 * 10**9, free=8 * 10**9)
    verdict, sentence = memory_verdict(needed, memory)
    assert verdict is fits
    assert words in sentence


def test_the_machine_has_some_memory_and_not_more_free_than_there_is():
    memory = machine_memory()
    assert 10**8 < memory.free <= memory.total
