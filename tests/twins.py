"""The same weights in `transformers`, padded batches for them, and gradients under one set of names."""

import math

import torch
from tiny_rl import tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from meshift.batch import micro_batches
from meshift.config.sections import TrainableConfig
from meshift.models.hf.save import save_model
from meshift.models.hf.stored import stored_tensors
from meshift.training.engine import TrainingEngine


def budget_for(sizes, num_parts):
    """A token budget that cuts these rows into so many micro-batches."""
    return next(b for b in range(sum(sizes), 0, -1) if len(micro_batches(sizes, b)) == num_parts)


def accumulated(model, loss, batch, num_parts, **options):
    """Our gradients, by name, and the statistics; `model` is a decoder, or the head of a tiny one."""
    model = tiny_model(model) if isinstance(model, str) else model
    config = TrainableConfig(
        max_tokens_per_micro_batch=budget_for(loss.reading.sizes(batch), num_parts), **options
    )
    engine = TrainingEngine(model, config, trainable=True)
    stats = engine.accumulate(loss, batch)
    return {name: p.grad for name, p in engine.model.named_parameters()}, stats


def relative_difference(ours, theirs):
    assert set(ours) == set(theirs)
    squares = [((ours[n] - theirs[n]).double().square().sum(), theirs[n].double().square().sum()) for n in ours]
    return math.sqrt(sum(d for d, _ in squares) / sum(s for _, s in squares))


def twin_of(model, tmp_path):
    """The same weights as a `transformers` model, with gradients under our names."""
    save_model(model, tmp_path)
    if model.head_kind == "lm":
        twin = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    else:
        twin = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32)
    stored = stored_tensors(model.config, model.head_kind)

    def gradients():
        theirs = dict(twin.named_parameters())
        parts = (held.split(theirs[name].grad) for name, held in stored.items())
        return {ours: gradient for part in parts for ours, gradient in part.items()}

    return twin, gradients


def padded(rows):
    width = max(len(row) for row in rows)
    tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    return tokens, torch.stack([(torch.arange(width) < len(row)).long() for row in rows])


def hidden_rows(twin, rows):
    tokens, mask = padded(rows)
    return twin.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state
