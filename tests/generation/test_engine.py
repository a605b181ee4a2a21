"""The engine against its plain twin, against full forward passes, and against itself in other company."""

import copy
import random

import numpy as np
import pytest
import torch

from meshift.errors import ConfigError, DataError, NonFiniteError
from meshift.generation import session as session_module
from meshift.generation.engine import GenerationEngine
from meshift.generation.fused import FusedDecoder
from meshift.generation.params import Request, SamplingParams
from meshift.generation.plain import generate_plain
from meshift.models.attention import PackedAttention, PlainAttention, packed_positions

PROMPTS = [[random.Random(i).randrange(61) for _ in range(1 + (7 * i) % 19)] for i in range(9)]


def params(max_new_tokens=10, **settings):
    return SamplingParams(max_new_tokens=max_new_tokens, **settings)


def decode(tokens):
    return "".join(chr(ord("a") + token % 7) for token in tokens)


def assert_same(ours, theirs, *, atol):
    for one, other in zip(ours, theirs, strict=True):
        assert one.index == other.index
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol)
        assert (one.finish_reason, one.truncated) == (other.finish_reason, other.truncated)
        assert one.num_stop_forbidden == other.num_stop_forbidden
        assert (one.support is None) == (other.support is None)
        for mine, yours in zip(one.support or [], other.support or [], strict=True):
            assert mine.tolist() == yours.tolist()


OPTIONS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "all": {"top_k": 12, "top_p": 0.8, "temperature": 1.3, "min_new_tokens": 2, "stop_token_ids": (1, 5, 9)},
    "stop_token": {"stop_token_ids": tuple(range(0, 60, 4))},
    "min_new_tokens": {"min_new_tokens": 4, "stop_token_ids": tuple(range(0, 60, 4))},
    "stop_string": {"stop_strings": ("ab", "cdc", "f")},
    "min_new_tokens_and_stop_string": {"stop_strings": ("a", "bc"), "min_new_tokens": 3},
}


@pytest.mark.parametrize("num_generations", [1, 3])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_engine_generates_what_its_plain_twin_does(model, option, num_generations):
    arguments = {"seed": 4, "num_generations": num_generations, "first_index": 100}
    sampling = params(**OPTIONS[option])
    ours = GenerationEngine(model, num_slots=5, decode=decode).generate(PROMPTS, sampling, **arguments)
    theirs = generate_plain(model, PROMPTS, sampling, decode=decode, **arguments)
    assert [completion.index for completion in ours] == list(range(100, 100 + 9 * num_generations))
    assert_same(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_every_kind_of_decoder_generates_what_its_plain_twin_does(make_model, family, tied, num_kv_heads):
    model = make_model(family, tied=tied, num_kv_heads=num_kv_heads, seed=1)
    ours = GenerationEngine(model, num_slots=4).generate(PROMPTS, params(), seed=2, num_generations=3)
    assert_same(ours, generate_plain(model, PROMPTS, params(), seed=2, num_generations=3), atol=1e-4)


@pytest.mark.parametrize(
    "features",
    [
        {"windows": (5, None)},
        {"windows": (3, 40)},
        {"attention_softcap": 1.0, "logit_softcap": 4.0},
        {"windows": (None, 4), "attention_softcap": 1.0, "query_scale": 0.5},
    ],
    ids=str,
)
def test_windows_shorter_than_the_text_and_caps_generate_what_the_plain_twin_does(make_model, features):
    prompts = [[1 + i % 59 for i in range(length)] for length in (44, 45, 60, 52)]
    model = make_model(seed=1, **features)
    ours = GenerationEngine(model, num_slots=3).generate(prompts + PROMPTS, params(14), seed=2)
    theirs = generate_plain(model, prompts + PROMPTS, params(14), seed=2)
    assert_same(ours, theirs, atol=1e-4)
    without = generate_plain(make_model(seed=1), prompts + PROMPTS, params(14), seed=2)
    assert [c.tokens for c in without] != [c.tokens for c in theirs], "the features change what is generated"


@pytest.mark.parametrize("option", ["plain", "all"])
@pytest.mark.parametrize("num_slots", [1, 3, 8, 64])
def test_order_and_slots_do_not_change_any_sequence(model, num_slots, option):
    requests = [Request(tokens=tokens, index=i) for i, tokens in enumerate(p for p in PROMPTS for _ in "ab")]
    sampling = params(**OPTIONS[option])
    reference = GenerationEngine(model, num_slots=7).generate_requests(requests, sampling, seed=9)
    shuffled = random.Random(num_slots).sample(requests, len(requests))
    ours = GenerationEngine(model, num_slots=num_slots).generate_requests(shuffled, sampling, seed=9)
    assert_same(sorted(ours, key=lambda completion: completion.index), reference, atol=1e-5)


def test_what_else_is_in_the_batch_does_not_change_a_sequence(model):
    engine = GenerationEngine(model)
    together = engine.generate(PROMPTS, params(), seed=9)
    for i, tokens in enumerate(PROMPTS):
        assert_same(engine.generate([tokens], params(), seed=9, first_index=i), [together[i]], atol=1e-5)


def test_a_small_prefill_budget_and_a_shared_prefix_over_several_admissions_change_nothing(model, monkeypatch):
    reference = GenerationEngine(model).generate(PROMPTS, params(), seed=1, num_generations=4)
    monkeypatch.setattr(session_module, "PREFILL_BUDGET", 6)
    ours = GenerationEngine(model, num_slots=3).generate(PROMPTS, params(), seed=1, num_generations=4)
    assert_same(ours, reference, atol=1e-5)


def test_each_prompt_is_run_once_however_many_completions_it_has(model, monkeypatch):
    rows = []
    forward = FusedDecoder.forward

    def counting(self, tokens, positions, attention, entering=None):
        rows.append(len(tokens))
        return forward(self, tokens, positions, attention, entering)

    monkeypatch.setattr(FusedDecoder, "forward", counting)
    GenerationEngine(model, num_slots=2).generate([[1] * 32], params(1), seed=0, num_generations=6)
    assert rows == [32]


def test_logprobs_are_those_of_a_full_forward_pass_over_the_finished_sequence(model):
    for tokens, completion in zip(
        PROMPTS, GenerationEngine(model, num_slots=4).generate(PROMPTS, params(20), seed=3), strict=True
    ):
        whole = torch.tensor([*tokens, *completion.tokens])
        with torch.no_grad():
            hidden = model(whole, packed_positions([len(whole)]), PackedAttention([len(whole)]))
            logprobs = model.head(hidden).log_softmax(dim=-1)
        rows = torch.arange(len(tokens) - 1, len(whole) - 1)
        expected = logprobs[rows, torch.tensor(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, expected.tolist(), atol=1e-4)


def test_a_trainer_can_rebuild_the_distribution_from_the_completion_alone(model):
    stops = tuple(range(0, 60, 3))
    sampling = params(8, temperature=0.8, top_k=9, top_p=0.9, min_new_tokens=3, stop_token_ids=stops)
    plain = params(8, temperature=0.8, min_new_tokens=3, stop_token_ids=stops)
    for sampling_params in (sampling, plain):
        for tokens, completion in zip(
            PROMPTS, GenerationEngine(model).generate(PROMPTS, sampling_params, seed=3), strict=True
        ):
            rebuilt = rebuild_logprobs(model, tokens, completion, sampling_params)
            np.testing.assert_allclose(completion.logprobs, rebuilt, atol=1e-4)


def rebuild_logprobs(model, prompt, completion, sampling, attention=PackedAttention):
    """The recipe of Completion's docstring, step by step."""
    whole = torch.tensor([*prompt, *completion.tokens])
    with torch.no_grad():
        logits = model.head(model(whole, packed_positions([len(whole)]), attention([len(whole)])))
    logprobs = []
    for t, token in enumerate(completion.tokens):
        scores = logits[len(prompt) - 1 + t].float() / sampling.temperature
        if t < completion.num_stop_forbidden:
            scores[list(sampling.stop_token_ids)] = float("-inf")
        if completion.support is not None:
            outside = torch.ones(len(scores), dtype=torch.bool)
            outside[torch.from_numpy(completion.support[t]).long()] = False
            scores[outside] = float("-inf")
        logprobs.append(float(scores.log_softmax(dim=0)[token]))
    return logprobs


def test_first_tokens_of_many_completions_follow_the_models_distribution(model):
    n = 4000
    completions = GenerationEngine(model, num_slots=512).generate(
        [[3, 1, 4]], params(1), seed=11, num_generations=n
    )
    with torch.no_grad():
        hidden = model(torch.tensor([3, 1, 4]), packed_positions([3]), PackedAttention([3]))
        expected = n * model.head(hidden[-1:])[0].double().softmax(dim=0).numpy()
    counts = np.bincount([completion.tokens[0] for completion in completions], minlength=61)
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 3.1 * (2 * freedom) ** 0.5 + 6


def test_the_kept_cache_serves_longer_shorter_and_more_sequences_and_new_weights(make_model):
    model = make_model(seed=5)
    engine = GenerationEngine(model)
    for prompts, length in ((PROMPTS, 8), ([[1] * 60], 40), (PROMPTS * 4, 3), ([[2]], 70)):
        ours = engine.generate(prompts, params(length), seed=1)
        assert_same(ours, generate_plain(model, prompts, params(length), seed=1), atol=1e-4)
        with torch.no_grad():
            model.embedding.weight.mul_(0.9)
    engine.release()
    ours = engine.generate(PROMPTS, params(), seed=1)
    assert_same(ours, generate_plain(model, PROMPTS, params(), seed=1), atol=1e-4)


def test_bfloat16_decode_errs_no_more_than_a_plain_bfloat16_forward(make_model):
    """Both against the same weights computed in fp32, over some 200 tokens."""
    model, sampling = make_model(seed=2).to(torch.bfloat16), params(20)
    exact = copy.deepcopy(model).float()
    ours, plain = [], []
    completions = GenerationEngine(model, num_slots=4).generate(PROMPTS, sampling, seed=3)
    for completion, prompt in zip(completions, PROMPTS, strict=True):
        expected = np.array(rebuild_logprobs(exact, prompt, completion, sampling, PlainAttention))
        ours.append(np.abs(completion.logprobs - expected))
        plain.append(np.abs(rebuild_logprobs(model, prompt, completion, sampling, PlainAttention) - expected))
    ours, plain = np.concatenate(ours), np.concatenate(plain)
    assert plain.mean() > 1e-3, "bf16 is visible at all"
    assert ours.mean() < 1.5 * plain.mean() + 1e-3
    assert ours.max() < 1.5 * plain.max() + 1e-2


def test_other_seeds_and_indices_give_other_tokens(model):
    engine = GenerationEngine(model)
    runs = [
        engine.generate([[5, 6]], params(), seed=seed, first_index=index)[0].tokens
        for seed, index in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({tuple(tokens) for tokens in runs}) == 3


def test_a_stop_on_the_last_token_is_no_truncation_and_running_out_is(model):
    sampling = params(6, temperature=0.0)
    (cut,) = GenerationEngine(model).generate([PROMPTS[3]], sampling, seed=0)
    assert (cut.finish_reason, cut.truncated, len(cut.tokens)) == ("length", True, 6)
    stops = params(6, temperature=0.0, min_new_tokens=0, stop_token_ids=(cut.tokens[-1],))
    (stopped,) = GenerationEngine(model).generate([PROMPTS[3]], stops, seed=0)
    assert (stopped.finish_reason, stopped.truncated) == ("stop_token", False)
    assert stopped.tokens == cut.tokens[: cut.tokens.index(cut.tokens[-1]) + 1]


def test_progress_counts_finished_sequences_and_tokens(model):
    seen, live = [], []

    def on_progress(finished, tokens, lengths):
        seen.append((finished, tokens))
        live.append(lengths)

    done = GenerationEngine(model, num_slots=2).generate(PROMPTS, params(3), seed=0, on_progress=on_progress)
    assert seen[-1] == (9, sum(len(completion.tokens) for completion in done))
    assert seen == sorted(seen)
    assert live[:3] == [[1, 1], [2, 2], []]
    assert all(len(lengths) <= 2 for lengths in live)
    assert live[-1] == []


def test_generation_leaves_gradients_possible(make_model):
    model = make_model(seed=1)
    GenerationEngine(model).generate(PROMPTS, params(2), seed=0)
    model.head(model(torch.tensor([1, 2]), packed_positions([2]), PackedAttention([2]))).sum().backward()
    assert model.embedding.weight.grad is not None


def test_no_prompts_give_no_completions(model):
    assert GenerationEngine(model).generate([], params(), seed=0) == []


def test_weights_that_are_nan_are_reported_and_do_not_poison_the_next_call(make_model):
    model = make_model(seed=3)
    engine = GenerationEngine(model)
    good = engine.generate(PROMPTS, params(), seed=0)
    weight = model.layers[0].attention.value.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="sequence 7 at generated position 0"):
        engine.generate(PROMPTS, params(), seed=0, first_index=7)
    with torch.no_grad():
        weight.copy_(kept)
    assert_same(engine.generate(PROMPTS, params(), seed=0), good, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "sampling", "error", "message"),
    [
        ([[1], []], params(), DataError, "sequence 1 is empty"),
        ([[1] * 120], params(), DataError, "120 tokens.*room for 118"),
        ([[1, 61]], params(), DataError, "outside 0 to 60"),
        ([[1, -1]], params(), DataError, "outside 0 to 60"),
        ([[1]], params(stop_strings=("x",)), ConfigError, "stop_strings"),
        ([[1]], params(stop_token_ids=(61,)), ConfigError, "stop_token_ids"),
    ],
)
def test_calls_the_model_cannot_serve_are_refused_by_engine_and_twin(model, prompts, sampling, error, message):
    with pytest.raises(error, match=message):
        GenerationEngine(model).generate(prompts, sampling, seed=0)
    with pytest.raises(error, match=message):
        generate_plain(model, prompts, sampling, seed=0)


def test_repeated_indices_zero_counts_and_scalar_heads_are_refused(model, make_model):
    twice = [Request(tokens=[1], index=0), Request(tokens=[2], index=0)]
    with pytest.raises(ConfigError, match="same index"):
        GenerationEngine(model).generate_requests(twice, params(), seed=0)
    with pytest.raises(ConfigError, match="num_generations"):
        GenerationEngine(model).generate([[1]], params(), seed=0, num_generations=0)
    with pytest.raises(ConfigError, match="num_slots"):
        GenerationEngine(model, num_slots=0)
    value = make_model()
    value.head_kind = "value"
    with pytest.raises(ConfigError, match="value head"):
        GenerationEngine(value)
