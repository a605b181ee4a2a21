"""Reward models and KL on texts, against `transformers` reading the same tokens."""

import shutil

import pytest
import torch
from benchmark_rows import HH, questions_of
from tiny_dialogue import save_dialogue_model

from meshift.errors import DataError, ModelError, NonFiniteError
from meshift.evaluation.reading import ScoreModel, ScoreReader, kl_to_reference
from meshift.evaluation.saved import Saved


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders: `policy`, `reference`, and `reward`, whose tokenizer ends texts with <|im_end|>."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("models")
    save_dialogue_model(folder / "policy")
    save_dialogue_model(folder / "reference", seed=1)
    config = LlamaConfig.from_pretrained(folder / "policy")
    config.num_labels = 1
    torch.manual_seed(2)
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "policy").save_pretrained(folder / "reward")
    return folder


def theirs(folder, text):
    """The score of `transformers`, of one text alone: the last position's, whatever its padding rule is."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model.score(model.model(ids).last_hidden_state[:, -1])[0, 0])


def test_responses_are_scored_at_their_end_token_or_where_the_limit_cut_them(models, tmp_path):
    questions = questions_of(tmp_path, "hh-rlhf", HH) * 3
    said = [" Hello, how are you?", " Go away.", " Go aw"]
    seen = []
    model = ScoreModel(
        ScoreReader(str(models / "reward"), "reward", chat=False),
        torch.float32,
        lambda what, done, total, failed=0: seen.append((what, done, total)),
    )
    found = model.scores(questions, said, [False, False, True])
    prompt = questions[0].prompt
    ends = ["<|im_end|>", "<|im_end|>", ""]
    expected = [theirs(models / "reward", prompt + text + end) for text, end in zip(said, ends, strict=True)]
    assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(one, 4) for one in expected}) == 3
    assert seen == [("responses read by the reward model", 3, 3)]


def test_a_chat_model_reads_turns(models, tmp_path):
    [question] = questions_of(tmp_path, "hh-rlhf", HH)
    model = ScoreModel(ScoreReader(str(models / "reward"), "reward", chat=True), torch.float32)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nGo away.<|im_end|>\n"
    [found] = model.scores([question], [" Go away."], [False])
    ends = [theirs(models / "reward", text), theirs(models / "reward", text.rstrip("\n"))]
    assert min(abs(found - end) for end in ends) < 1e-5


@pytest.fixture(scope="module")
def bare(models):
    """The reward model without its chat template."""
    import json
    import shutil

    folder = models / "bare"
    shutil.copytree(models / "reward", folder)
    for path in folder.glob("chat_template*"):
        path.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_reward_model_without_a_template_reads_a_chat_models_answers_as_texts(models, bare, tmp_path):
    """As `meshift reward` trains it on such dialogues; the blank that a chat model leaves out is in those."""
    [question] = questions_of(tmp_path, "hh-rlhf", HH)
    reader = ScoreReader(bare, "reward", chat=True, policy=str(models / "policy"))
    assert reader.check([question]) == [
        f"the reward model {bare} has no chat template; it reads the dialogues as texts, as it was trained"
    ]
    said = ["Go away.", " Go away.", "Go away."]
    found = ScoreModel(reader, torch.float32).scores([question] * 3, said, [False, False, True])
    assert found[0] == found[1] == pytest.approx(theirs(bare, question.prompt + " Go away.<|im_end|>"), abs=1e-5)
    assert found[2] == pytest.approx(theirs(bare, question.prompt + " Go away."), abs=1e-5)


def test_a_reward_model_without_a_template_reads_messages_in_the_policys_or_not_at_all(models, bare, tmp_path):
    messages = [{"role": "user", "content": "Hi"}]
    [question] = questions_of(tmp_path, "hh-rlhf", {"prompt": messages})
    reader = ScoreReader(bare, "reward", chat=True, policy=str(models / "policy"))
    assert f"in the chat template of {models / 'policy'}" in reader.check([question])[0]
    whole = ScoreReader(str(models / "reward"), "reward", chat=True)
    assert reader.tokens(question, "Go away.", False) == whole.tokens(question, "Go away.", False)
    with pytest.raises(ModelError, match=r"would read the messages of .*hh-rlhf.jsonl:1; put chat_template into"):
        ScoreReader(bare, "reward", chat=True).check([question])


def test_what_no_reward_model_can_read_is_named(models, tmp_path):
    [question] = questions_of(tmp_path, "hh-rlhf", HH)
    with pytest.raises(ModelError, match="it is no reward model"):
        ScoreModel(ScoreReader(str(models / "policy"), "cost", chat=False), torch.float32)
    model = ScoreModel(ScoreReader(str(models / "reward"), "reward", chat=False), torch.float32)
    with pytest.raises(DataError, match=r"hh-rlhf.jsonl:1: prompt and response have \d+ tokens, and .* takes 512"):
        model.scores([question], ["long " * 200], [False])


def test_kl_is_the_sum_over_a_completions_tokens_of_both_models_full_logits(models):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    saved = [
        Saved(
            id="q",
            sample=j,
            completion="",
            prompt_ids=torch.randint(0, 250, (4,)).tolist(),
            completion_ids=torch.randint(0, 250, (3 + j,)).tolist(),
        )
        for j in range(3)
    ]
    names = [str(models / name) for name in ("policy", "reference")]
    loaded = [AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in names]
    expected = []
    for one in saved:
        ids = torch.tensor([[*one.prompt_ids, *one.completion_ids]])
        sums = []
        for model in loaded:
            with torch.no_grad():
                logits = model(ids).logits[0, len(one.prompt_ids) - 1 : -1]
            chosen = torch.log_softmax(logits.double() / 0.7, -1).gather(
                1, torch.tensor(one.completion_ids)[:, None]
            )
            sums.append(float(chosen.sum()))
        expected.append(sums[0] - sums[1])
    how, told = {"temperature": 0.7, "dtype": torch.float32}, []
    found = kl_to_reference(*names, saved, **how, on_progress=lambda *count: told.append(count))
    assert found == pytest.approx(expected, abs=1e-4)
    assert told == [("completions read by the actor", 3, 3), ("completions read by the reference", 3, 3)]
    assert kl_to_reference(names[0], names[0], saved, **how) == [0.0] * 3
    with pytest.raises(DataError, match="completion 4 of 'q' has no token ids"):
        kl_to_reference(*names, [Saved(id="q", sample=4, completion="x")], **how)


@pytest.fixture
def spoil(models, tmp_path):
    """A copy of one of the models, to which one token is no number."""

    def copy(name, token):
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

        folder = tmp_path / f"spoiled-{name}"
        shutil.copytree(models / name, folder)
        kind = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
        model = kind.from_pretrained(folder, config=AutoConfig.from_pretrained(folder), dtype=torch.float32)
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = torch.nan
        model.save_pretrained(folder)
        return str(folder)

    return copy


def test_a_score_that_is_no_number_would_be_counted_as_unsafe_and_lost_and_hide_the_mean(models, spoil, tmp_path):
    questions = questions_of(tmp_path, "hh-rlhf", HH) * 3
    good = ScoreModel(ScoreReader(str(models / "reward"), "cost", chat=False), torch.float32)
    said = [" Hello.", " Q!", " Goodbye."]
    assert len(good.scores(questions, said, [False] * 3)) == 3
    spoiled = spoil("reward", last_token(models, questions[1], said[1]))
    model = ScoreModel(ScoreReader(spoiled, "cost", chat=False), torch.float32)
    with pytest.raises(NonFiniteError) as caught:
        model.scores(questions, said, [False] * 3)
    sentence = str(caught.value)
    assert sentence.startswith(f"the score of the cost model {spoiled} is nan for ")
    assert " of 3 responses (" in sentence
    assert "hh-rlhf.jsonl:1: ' Q!'" in sentence


def last_token(models, question, said):
    return ScoreReader(str(models / "reward"), "cost", chat=False).tokens(question, said, False)[-1]


def test_kl_of_which_one_token_is_no_number_names_the_completion(models, spoil):
    def saved(name, tokens):
        return Saved(id=name, sample=2, completion="", prompt_ids=[5, 6], completion_ids=tokens)

    policy = str(models / "policy")
    with pytest.raises(NonFiniteError, match=r"is nan for 1 of 2 responses \(b, sample 2\)"):
        kl_to_reference(
            policy,
            spoil("policy", 9),
            [saved("a", [7, 8]), saved("b", [9, 8])],
            temperature=1.0,
            dtype=torch.float32,
        )
