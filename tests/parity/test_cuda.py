"""The same code on one CUDA device; `pytest -m gpu` runs these where there is one."""

import pytest
import torch
from tiny_rl import random_rollout, tiny_model

from meshift.algorithms.losses import PolicyLoss
from meshift.config.sections import TrainableConfig
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.training.engine import TrainingEngine, TrainTask
from meshift.training.readings import TokenLogprobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_logprobs_would_differ_between_devices():
    batch = random_rollout()
    read = [
        TrainingEngine(tiny_model().to(device), TrainableConfig(), trainable=False).infer(TokenLogprobs(), batch)
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(read[0]["new_logprobs"].values, read[1]["new_logprobs"].values, rtol=0, atol=1e-4)


def test_an_update_would_differ_between_devices():
    batch, weights = random_rollout(), []
    for device in ("cpu", "cuda"):
        engine = TrainingEngine(tiny_model().to(device), TrainableConfig(), trainable=True)
        engine.train(TrainTask(loss=PolicyLoss(reading=TokenLogprobs())), batch, rate=1e-3, seed=0)
        weights.append({name: p.detach().cpu() for name, p in engine.model.named_parameters()})
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)


def test_greedy_tokens_would_differ_between_devices():
    params = SamplingParams(max_new_tokens=8, temperature=0)
    prompts = [[1, 2, 3], [4], [5, 6]]
    found = [
        [c.tokens for c in GenerationEngine(tiny_model().to(device)).generate(prompts, params, seed=0)]
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1]
