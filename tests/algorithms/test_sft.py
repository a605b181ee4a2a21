"""Fine-tuning's loss and gradient are those of `transformers` with labels of -100 on a padded batch."""

import re

import pytest
import torch
from tiny_rl import tiny_model
from tiny_texts import random_demonstrations
from twins import accumulated, padded, relative_difference, twin_of

from meshift.algorithms.losses import TokenCrossEntropy
from meshift.algorithms.sft import sft_graph
from meshift.config.sections import TrainableConfig
from meshift.errors import NonFiniteError
from meshift.runtime.role import LocalRole
from meshift.step import run_step


def padded_labels(batch):
    tokens, mask = padded(batch["tokens"].rows())
    trained, _ = padded(batch["loss_mask"].rows())
    return tokens, mask, torch.where(trained.bool(), tokens, -100)


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_loss_and_gradient_are_those_of_transformers_on_a_padded_batch(tmp_path, num_parts):
    batch = random_demonstrations()
    ours, stats = accumulated("lm", TokenCrossEntropy(), batch, num_parts)
    twin, gradients = twin_of(tiny_model(), tmp_path)
    tokens, mask, labels = padded_labels(batch)
    out = twin(input_ids=tokens, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert stats["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert relative_difference(ours, gradients()) < 1e-5
    trained = labels[:, 1:] != -100
    hits = (out.logits[:, :-1].argmax(-1) == labels[:, 1:])[trained]
    assert stats["correct"] == pytest.approx(hits.float().mean().item())


def test_a_step_lowers_the_loss_of_its_own_batch_and_logs_the_fields_names():
    role = LocalRole("actor", tiny_model(), TrainableConfig(learning_rate=0.01), trainable=True, max_steps=9)
    batch = random_demonstrations()
    metrics = [run_step(sft_graph(), {"actor": role}, batch, step).metrics for step in range(5)]
    losses = [row["loss"] for row in metrics]
    assert losses == sorted(losses, reverse=True)
    assert set(metrics[0]) == {"loss", "mean_token_accuracy", "grad_norm", "lr", "timing_s/train_actor"}


def test_a_text_whose_loss_is_no_number_is_named():
    batch = random_demonstrations()
    word = int(batch["tokens"].rows()[2][0])
    alone = [i for i, row in enumerate(batch["tokens"].rows()) if word in row.tolist()]
    trained = [i for i in alone if batch["loss_mask"].rows()[i][1:].any()]
    role = LocalRole("actor", tiny_model(), TrainableConfig(), trainable=True)
    with torch.no_grad():
        role.model.embedding.weight[word] = torch.nan
    with pytest.raises(NonFiniteError) as caught:
        run_step(sft_graph(), {"actor": role}, batch, 0)
    named = re.findall(r"texts\.jsonl:(\d+)", str(caught.value))
    assert named
    assert set(named) <= {str(i + 1) for i in trained}
    assert len(trained) < len(batch)
