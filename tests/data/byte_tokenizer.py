"""A tokenizer of bytes, and of the merges one gives it: what it does can be seen by eye."""

from chat_templates import CHATML, plain
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|im_start|>", "<|head|>", "<|/head|>", "<|eot|>")
MERGES = (("Ġ", "y"), ("Ċ", "Ċ"), ("o", "Ġ"), ("Ġ", "Ġ"))
"""A blank with `y`, two newlines, an `o` with a blank behind it: tokens that lie across where texts part."""


def byte_tokenizer(merges=(), **options):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *("".join(merge) for merge in merges)]
    model = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=list(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL),
        chat_template=plain(CHATML),
        **options,
    )
