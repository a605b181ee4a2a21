"""Each family trains by each method on the gradients of a padded computation in `transformers`."""

import pytest
import torch
from family_variants import EACH_FAMILY, SIZES
from tiny_texts import random_demonstrations, random_pairs
from twins import accumulated, hidden_rows, padded, relative_difference, twin_of

from meshift.algorithms.losses import DPOLoss, PairwiseLoss, TokenCrossEntropy
from meshift.models.hf.load import load_model

BETA = 0.3
VOCABULARY = {"vocab_size": SIZES["vocab_size"]}


def logps_of(twin, batch, side):
    tokens, mask = padded(batch[side].rows())
    logprobs = torch.log_softmax(twin(input_ids=tokens, attention_mask=mask).logits[:, :-1], -1)
    inside = mask[:, 1:].bool() & (torch.arange(1, tokens.shape[1]) >= batch["num_prompt_tokens"].values[:, None])
    return (logprobs.gather(2, tokens[:, 1:, None])[..., 0] * inside).sum(-1)


def score_of(twin, batch, side):
    rows = batch[side].rows()
    last = torch.tensor([len(row) - 1 for row in rows])
    return twin.score(hidden_rows(twin, rows))[torch.arange(len(rows)), last, 0]


def sft(twin, batch):
    tokens, mask = padded(batch["tokens"].rows())
    trained, _ = padded(batch["loss_mask"].rows())
    return twin(input_ids=tokens, attention_mask=mask, labels=torch.where(trained.bool(), tokens, -100)).loss


def dpo(twin, batch):
    ahead, behind = (
        logps_of(twin, batch, side) - batch[f"ref_{side}_logps"].values for side in ("chosen", "rejected")
    )
    return -(batch["pair_weight"].values * torch.log(torch.sigmoid(BETA * (ahead - behind)))).mean()


def reward(twin, batch):
    margin = score_of(twin, batch, "chosen") - score_of(twin, batch, "rejected")
    wanted = batch["required_margin"].values
    return -(batch["pair_weight"].values * torch.log(torch.sigmoid(margin - wanted))).mean()


METHODS = {
    "sft": ("lm", TokenCrossEntropy(), random_demonstrations, sft),
    "dpo": ("lm", DPOLoss(beta=BETA), random_pairs, dpo),
    "reward": ("reward", PairwiseLoss(), random_pairs, reward),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EACH_FAMILY)
def test_no_family_gets_other_gradients_than_in_transformers(saved, tmp_path, name, method):
    head, loss, draw, naive = METHODS[method]
    folder = saved(name, "score" if head == "reward" else "lm").folder
    batch = draw(**VOCABULARY)
    ours, stats = accumulated(load_model(folder, head=head), loss, batch, 2)
    twin, gradients = twin_of(load_model(folder, head=head), tmp_path / "twin")
    twin.set_attn_implementation("eager")
    expected = naive(twin.train(False), batch)
    expected.backward()
    assert stats["loss"] == pytest.approx(expected.item(), rel=2e-5)
    assert relative_difference(ours, gradients()) < 2e-5
