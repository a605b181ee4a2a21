"""A tiny random model with a tiny tokenizer, made by `transformers`, as a folder on disk."""

import pytest
from evaluations import DIALOGUES, QUESTIONS, write

WORDS = ("the", "film", "was", "a", "good", "bad", "great", "dull", "story", "and", "I", "liked", "it", "not")
WORDS += (".", "!", "user", "assistant")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: i for i, token in enumerate(["<unk>", "<eos>", "<end>", *WORDS, *(f"Ġ{w}" for w in WORDS)])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": ["<end>"]})
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder whose generation_config.json names an end that the tokenizer does not."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,  # large, so that greedy texts are no single word repeated
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [1, 2]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward(tiny_model, tmp_path_factory):
    """A reward model with the tiny model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("rewards") / "tiny-reward"
    config = LlamaConfig.from_pretrained(tiny_model)
    config.num_labels, config.pad_token_id = 1, 1
    torch.manual_seed(1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def room(tmp_path, tiny_model, tiny_reward):
    """A folder of good input, to be spoiled."""
    from bad_input import Room

    return Room(tmp_path, tiny_model, tiny_reward)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """`evaluate(*words)` -> (exit code, what was printed, what was said on stderr), in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "gsm8k.jsonl", QUESTIONS)
    write(tmp_path / "hh.jsonl", DIALOGUES)

    from meshift.cli.main import main

    def run(*words):
        code = main(["eval", *map(str, words)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
