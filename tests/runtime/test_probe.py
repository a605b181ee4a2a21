"""A generator that makes another model of the weights it got stops the step, in every process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from gang import run_gang
from tiny_families import family_model

from meshift.config.sections import TrainableConfig
from meshift.errors import ReallocationError
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.runtime.role import LocalRole
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.world import World

LAYOUTS = [("t2", "d2"), ("d2", "p2"), ("p2", "t2"), ("d1", "p2")]


def make(model, place, trainable):
    return LocalRole("actor", model, TrainableConfig(), trainable=trainable, place=place).can_generate(3, str)


def spread(world, train, generate, dtype):
    def placement(layout):
        return Placement.parse("0-1" if "2" in layout else "0", layout)

    placements = {"train": placement(train), "generate": placement(generate)}
    return SpreadRole("actor", placements, world, lambda: family_model("qwen3").to(dtype), make)


def check(rank):
    devices = {Device(index=i): i for i in range(2)}
    world = World(rank=rank, ranks=devices, group=dist.new_group([0, 1], backend="gloo"))
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):
        for train, generate in LAYOUTS:
            role = spread(world, train, generate, dtype)
            assert 0 <= role.publish()["sync/probe_diff_max"] < most
    role = spread(world, "d2", "t2", torch.float32)
    layer = role._at(role.placements["generate"]).model.layers[1]
    layer.attention.layer = replace(layer.attention.layer, scale=3.0)  # its weights are right, what it does is not
    engine = role._at(role.placements["generate"]).generator
    engine._decoder.release()
    with pytest.raises(ReallocationError, match=r"the actor at d1t2p1@0-1 .* other log-probs than d2t1p1@0-1"):
        role.publish()


def test_a_generator_that_reads_its_weights_wrongly_would_go_on(tmp_path):
    run_gang(2, check, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_reads_what_it_draws(dtype):
    engine = GenerationEngine(family_model("gemma2").to(dtype))
    params = SamplingParams(max_new_tokens=6)
    prompt = [3, 1, 4]
    (drawn,) = engine.generate([prompt], params, seed=1)
    read = engine.logprobs([[*prompt, *drawn.tokens], [5, 6]])
    assert len(read) == len(prompt) + len(drawn.tokens) - 1 + 1
    found = torch.tensor(read[len(prompt) - 1 : len(prompt) - 1 + len(drawn.tokens)])
    torch.testing.assert_close(
        found, torch.tensor(drawn.logprobs), atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0
    )
