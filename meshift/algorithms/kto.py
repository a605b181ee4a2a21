"""KTO: completions that were liked or not, one at a time, against what is usual for the policy.

Source: Ethayarajh et al. 2024 (KTO, arXiv 2402.01306), section 4. What is usual is z, an estimate of KL(policy ||
reference) from texts that do not belong together: each prompt of the step with the completion of another prompt.
It is of the whole step, and of the weights that the step's one update starts from, whatever the micro-batches and
the processes. The formula is in `KTOLoss`. It knows nothing of data files.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from meshift.algorithms.preference_losses import KTOLoss
from meshift.algorithms.rollouts import infer_call, require_numbers, sync_calls
from meshift.batch import WHERE, Batch, Outcome, Ragged
from meshift.config.runs import KTORunConfig
from meshift.graph.calls import Call, Graph, HostCall, ModelCall
from meshift.training.engine import TrainTask
from meshift.training.text_readings import CompletionLogprobs

MATCHED = CompletionLogprobs(key="ref_logps")
MISMATCHED = CompletionLogprobs(key="mismatched_logps", texts="mismatched")
REF_MISMATCHED = CompletionLogprobs(key="ref_mismatched_logps", texts="mismatched")
KTO_INPUTS = ("tokens", "mismatched", "num_prompt_tokens", "label")


def kto_graph(config: KTORunConfig) -> Graph:
    """One update per step, on all of the step's completions."""
    own, other = ("tokens", "num_prompt_tokens"), ("mismatched", "num_prompt_tokens")
    calls: tuple[Call, ...] = (
        infer_call("reference", "reference", MATCHED, own, MATCHED.key),
        infer_call("reference_mismatched", "reference", REF_MISMATCHED, other, REF_MISMATCHED.key),
        infer_call("mismatched", "actor", MISMATCHED, other, MISMATCHED.key),
        HostCall(
            name="kl_term",
            function=kl_term,
            reads=(MISMATCHED.key, REF_MISMATCHED.key, WHERE),
            writes=("kl_term",),
        ),
        ModelCall(
            name="train_actor",
            role="actor",
            kind="train",
            task=TrainTask(loss=kto_loss(config)),
            reads=(*own, "label", MATCHED.key, "kl_term", WHERE),
        ),
        *sync_calls(config.reference),
    )
    return Graph(calls, frozenset((*KTO_INPUTS, WHERE)))


def kto_loss(config: KTORunConfig) -> KTOLoss:
    """The loss that a config asks for, of training and of held-out rows."""
    kto = config.kto
    return KTOLoss(beta=kto.beta, desirable_weight=kto.desirable_weight, undesirable_weight=kto.undesirable_weight)


def kl_term(batch: Batch) -> Outcome:
    """z = max(0, mean of log p - log p_ref over the mismatched completions), the same number in every row."""
    apart = batch[MISMATCHED.key].values.double() - batch[REF_MISMATCHED.key].values.double()
    term = max(0.0, float(require_numbers(apart, batch, "log p - log p_ref of the mismatched completions").mean()))
    return Outcome(batch=Batch({"kl_term": Ragged.scalars(torch.full((len(batch),), term))}), metrics={"kl": term})


def mismatched(tokens: Ragged, num_prompt_tokens: torch.Tensor, max_length: int) -> Ragged:
    """Every prompt with the completion of the row that `partners` gives it, cut at `max_length`."""
    rows = [row.tolist() for row in tokens.rows()]
    parts = [(row[:n], row[n:]) for row, n in zip(rows, num_prompt_tokens.tolist(), strict=True)]
    others = partners([tuple(prompt) for prompt, _ in parts])
    texts = [(prompt + parts[j][1])[:max_length] for (prompt, _), j in zip(parts, others, strict=True)]
    return Ragged.from_rows(texts, torch.int64)


def partners(prompts: Sequence[Hashable]) -> list[int]:
    """For each row the number of one with another prompt; the next row where all prompts are the same.

    Rows are put in blocks of one prompt, by first appearance, and each takes the row that is as many places on as
    the largest block has rows, which lies in another block: so every completion is taken once, as long as no
    prompt has more than half of the rows. Where one has, its rows take turns with all the others.
    """
    blocks: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        blocks.setdefault(prompt, []).append(row)
    order = [row for block in blocks.values() for row in block]
    largest, found = max(map(len, blocks.values())), [0] * len(prompts)
    for place, row in enumerate(order):
        if len(blocks) == 1 or 2 * largest <= len(prompts):
            step = 1 if len(blocks) == 1 else largest
            found[row] = order[(place + step) % len(order)]
        else:
            others = [other for other in order if prompts[other] != prompts[row]]
            found[row] = others[place % len(others)]
    return found
