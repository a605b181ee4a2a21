"""What devices hold, by what it is: in all what the evaluator has as one number, for every device there is."""

import pytest
import tiny_steps

from meshift.layout.layout import Placement
from meshift.planner import checking
from meshift.planner.evaluate import peak_bytes
from meshift.planner.footprint import PARTS, alike, footprints, in_words, tightest, worst

PLACED = {
    "actor": {"generate": Placement.parse("0-3", "d4t1p1"), "train": Placement.parse("0-3", "d1t2p2")},
    "reference": {"infer": Placement.parse("4-5", "d2t1p1")},
    "critic": {"infer": Placement.parse("4-7", "d4t1p1s"), "train": Placement.parse("4-7", "d4t1p1s")},
}


@pytest.fixture
def step():
    return tiny_steps.step(actor=tiny_steps.llama(layers=3))


def found_in(step):
    return {call.name: footprints(step, tiny_steps.device(), PLACED, call) for call in step.calls}


def test_parts_of_a_devices_memory_would_not_be_all_of_it(step):
    found = found_in(step)
    peaks = peak_bytes(step, tiny_steps.device(), PLACED)  # those of moves too
    assert {call: worst(devices).total for call, devices in found.items()} == {call: peaks[call] for call in found}
    assert all(set(one.parts) == set(PARTS) for devices in found.values() for one in devices)


def test_a_part_would_be_called_another(step):
    found = found_in(step)
    drawing, training = found["rollout"][0], found["train_actor"][0]
    assert drawing.parts["cache"] > 0
    assert training.parts["cache"] == 0
    assert training.parts["optimizer"] == 3 * training.parts["gradients"]  # bfloat16: a master and two moments
    assert found["reference"][0].parts["optimizer"] > 0, "the critic's, which lives there too"
    largest = max(training.parts, key=training.parts.get)
    assert in_words(training).startswith({"optimizer": "masters and moments"}.get(largest, largest))


def test_a_device_would_be_left_out_or_put_among_others_that_hold_more(step):
    found = found_in(step)
    groups = alike(found)
    assert sorted(device.index for group in groups for device in group.devices) == list(range(8))
    by_device = {device.index: group.peaks for group in groups for device in group.devices}
    assert by_device[6]["reference"] == 0 < by_device[5]["reference"]
    for call, devices in found.items():
        for one in devices:
            assert one.total <= by_device[one.device.index][call] <= one.total + 1e8
    sentence = tightest(found, 16e9)
    peaks = {call: worst(devices).total for call, devices in found.items()}
    assert sentence.startswith(f"Memory is tightest in {max(peaks, key=peaks.get)}: ")
    assert "of 16.0 GB on device" in sentence


def test_a_move_that_does_not_fit_would_be_passed_over(step, monkeypatch):
    every = peak_bytes(step, tiny_steps.device(), PLACED)
    monkeypatch.setattr(checking, "peak_bytes", lambda *given: {**every, "actor to generate": 9e9})
    (sentence,) = checking.shortages(step, tiny_steps.device(), PLACED)
    assert sentence.startswith("`actor to generate` (the move of new weights) needs 9.0 GB on a device")
