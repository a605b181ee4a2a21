"""KTO's loss and gradient are those of a naive padded computation, with one KL term for the whole step."""

import random

import pytest
import torch
from tiny_choice import VOCAB, next_probabilities
from tiny_rl import tiny_model
from tiny_texts import random_pairs
from twins import budget_for, padded, relative_difference, twin_of

from meshift.algorithms.kto import kl_term, kto_graph, kto_loss, mismatched, partners
from meshift.batch import WHERE, Batch, Ragged
from meshift.config.loading import make_config
from meshift.config.runs import KTORunConfig
from meshift.config.sections import TrainableConfig
from meshift.runtime.role import LocalRole
from meshift.step import run_step
from meshift.training.text_readings import CompletionLogprobs

BETA = 0.3
LIKED = [True, False, False, True, True, False]


def config_for(**keys):
    values = {
        "output_dir": "unused",
        "data": {"dataset_name": "unused"},
        "actor": {"model_name_or_path": "unused"},
        "kto": {"beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.7},
    }
    return make_config(KTORunConfig, values | keys)


def judged(rows, num_prompt_tokens, labels):
    tokens = Ragged.from_rows(rows, torch.int64)
    prompts = torch.as_tensor(num_prompt_tokens)
    fields = {
        "tokens": tokens,
        "mismatched": mismatched(tokens, prompts, 64),
        "num_prompt_tokens": Ragged.scalars(prompts),
        "label": Ragged.scalars(labels, torch.bool),
    }
    return Batch(fields, {WHERE: ["here"] * len(tokens)})


def random_judged():
    pairs = random_pairs()
    prompts = pairs["num_prompt_tokens"].values.clamp(min=1)  # a completion of its own for every row
    return judged([row.tolist() for row in pairs["chosen"].rows()], prompts, LIKED)


def naive_logps(model, rows, num_prompt_tokens):
    tokens, mask = padded(rows)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    per_token = torch.log_softmax(logits, -1).gather(2, tokens[:, 1:, None])[..., 0]
    inside = mask[:, 1:].bool() & (torch.arange(1, tokens.shape[1]) >= num_prompt_tokens[:, None])
    return (per_token * inside).sum(-1)


def test_each_prompt_gets_the_next_rows_completion_where_all_prompts_differ():
    tokens = Ragged.from_rows([[1, 2, 3], [4, 5], [6, 7, 8, 9]])
    found = mismatched(tokens, torch.tensor([2, 1, 1]), 3)
    assert [row.tolist() for row in found.rows()] == [[1, 2, 5], [4, 7, 8], [6, 3]]


@pytest.mark.parametrize("seed", range(20))
def test_a_completion_would_be_held_against_its_own_prompt(seed):
    """Rows of one prompt are neighbours in files of pairs; no text of z may belong together."""
    draw = random.Random(seed)
    prompts = [draw.randrange(draw.choice((2, 3, 12))) for _ in range(draw.randrange(2, 20))]
    prompts = sorted(prompts) if seed % 2 else prompts
    if len(set(prompts)) == 1:
        prompts.append(max(prompts) + 1)
    found = partners(prompts)
    assert all(prompts[i] != prompts[j] for i, j in enumerate(found))
    if max(map(prompts.count, prompts)) <= len(prompts) / 2:
        assert sorted(found) == list(range(len(prompts))), "every completion counts once"


def test_completions_of_one_prompt_are_held_against_each_other():
    assert partners(["a"] * 3) == [1, 2, 0]
    assert partners(["a", "a", "a", "b", "a"]) == [3, 3, 3, 0, 3]


def test_the_kl_term_is_the_mean_log_ratio_and_never_negative():
    batch = Batch(
        {
            "mismatched_logps": Ragged.scalars(torch.tensor([-3.0, -5.0])),
            "ref_mismatched_logps": Ragged.scalars(torch.tensor([-4.0, -5.5])),
        }
    )
    outcome = kl_term(batch)
    assert outcome.batch["kl_term"].values.tolist() == [0.75, 0.75]
    assert outcome.metrics == {"kl": 0.75}
    swapped = Batch(
        {"mismatched_logps": batch["ref_mismatched_logps"], "ref_mismatched_logps": batch["mismatched_logps"]}
    )
    assert kl_term(swapped).batch["kl_term"].values.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_parts", [1, 2, 6])
def test_loss_and_gradient_are_those_of_a_padded_computation_in_transformers(tmp_path, num_parts):
    """The whole graph, with actor and reference apart, against one forward pass over all rows."""
    batch, config = random_judged(), config_for()
    budget = budget_for(CompletionLogprobs().sizes(batch), num_parts)
    how = TrainableConfig(max_tokens_per_micro_batch=budget, learning_rate=1e-12)
    actor = LocalRole("actor", tiny_model(seed=0), how, trainable=True)
    reference = LocalRole("reference", tiny_model(seed=1), how)
    actor.trainer.optimizer.step = lambda rate: 1.0  # keep the gradients
    metrics = run_step(kto_graph(config), {"actor": actor, "reference": reference}, batch, 0).metrics

    (tmp_path / "actor").mkdir()
    (tmp_path / "reference").mkdir()
    twin, gradients = twin_of(tiny_model(seed=0), tmp_path / "actor")
    other, _ = twin_of(tiny_model(seed=1), tmp_path / "reference")
    prompts, liked = batch["num_prompt_tokens"].values, torch.tensor(LIKED)
    with torch.no_grad():
        rows = batch["mismatched"].rows()
        term = (naive_logps(twin, rows, prompts) - naive_logps(other, rows, prompts)).mean().clamp(min=0)
        ref = naive_logps(other, batch["tokens"].rows(), prompts)
    ratio = naive_logps(twin, batch["tokens"].rows(), prompts) - ref
    assert term > 0, "a term of zero could not be missed"
    gains = 1.5 * (1 - torch.sigmoid(BETA * (ratio - term)))
    losses = 0.7 * (1 - torch.sigmoid(BETA * (term - ratio)))
    loss = torch.where(liked, gains, losses).mean()
    loss.backward()
    ours = {name: p.grad for name, p in actor.trainer.model.named_parameters()}
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(term.item(), rel=1e-4)
    assert relative_difference(ours, gradients()) < 1e-5
    assert metrics["rewards/chosen"] == pytest.approx(BETA * ratio[liked].mean().item(), rel=1e-4)
    assert metrics["rewards/rejected"] == pytest.approx(BETA * ratio[~liked].mean().item(), rel=1e-4)


def test_every_key_of_the_config_reaches_the_loss():
    loss = kto_loss(config_for())
    assert (loss.beta, loss.desirable_weight, loss.undesirable_weight) == (BETA, 1.5, 0.7)


def trained(shares, num_steps=60, **keys):
    """The next-token probabilities of an actor that saw each token liked so many times in four."""
    rows, labels = [], []
    for token, share in enumerate(shares):
        rows += [[1, token]] * 4
        labels += [i < share for i in range(4)]
    batch = judged(rows, [1] * len(rows), labels)
    rate = TrainableConfig(learning_rate=5e-3)
    model = {"vocab_size": VOCAB, "scale": 0.2}
    roles = {
        "actor": LocalRole("actor", tiny_model(**model), rate, trainable=True, max_steps=num_steps),
        "reference": LocalRole("reference", tiny_model(**model), rate),
    }
    config = config_for(kto={"beta": 0.5, **keys})
    for step in range(num_steps):
        run_step(kto_graph(config), roles, batch, step)
    return next_probabilities(roles["actor"].model, [1])


def test_what_most_people_like_gets_all_the_mass_and_the_weights_move_the_border():
    """Completion y's loss falls in d_y where w_D q_y > w_U (1 - q_y), q_y being the share that likes it, and rises
    where it is less: the optimum has its mass on tokens 1 and 6, and the weights decide on 4, which half like."""
    shares = [0, 3, 1, 0, 2, 1, 4, 0]
    before = next_probabilities(tiny_model(vocab_size=VOCAB, scale=0.2), [1])
    after = trained(shares)
    assert before[[1, 6]].sum() < 0.5
    assert after[[1, 6]].sum() > 0.9
    assert after[1] > 0.1
    assert trained(shares, desirable_weight=2.0)[4] > before[4]
    assert trained(shares, undesirable_weight=1.5)[4] < 0.2 * before[4]
