"""Tiny models with tokenizers on disk, data files, and configs of runs on them."""

import json

import pytest
from broken_runs import KEPT
from spread_cases import POLICY, SMOOTH, data_of
from spread_cases import REWARDS as ODD
from tiny_rl import tiny_model

from meshift.config.loading import make_config
from meshift.config.policy_runs import OnlineDPORunConfig
from meshift.config.runs import (
    DPORunConfig,
    KTORunConfig,
    ORPORunConfig,
    PPORunConfig,
    RewardRunConfig,
    SFTRunConfig,
    SimPORunConfig,
)
from meshift.models.hf.load import load_tokenizer
from meshift.models.hf.save import save_model

WORDS = ("the", "film", "was", "a", "good", "bad", "great", "dull", "story", "and", "liked", "it", "not", ".")


def save_tokenizer(folder, words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """`make_folder(head="lm", words=WORDS)` -> the folder of a random model with a tokenizer where pad is eos."""

    def make(head="lm", words=WORDS, seed=0, hidden_size=16):
        folder = tmp_path_factory.mktemp("model")
        save_tokenizer(folder, words)
        model = tiny_model(head, vocab_size=2 + len(words), seed=seed, hidden_size=hidden_size)
        saved = folder.with_name(folder.name + "-saved")
        save_model(model, saved, tokenizer=load_tokenizer(folder))
        return saved

    return make


@pytest.fixture(scope="session")
def actor_folder(make_folder):
    return make_folder()


@pytest.fixture(scope="session")
def reward_folder(make_folder):
    return make_folder("reward", seed=4)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    """Ragged prompts, each with an answer and a list of hints."""
    texts = ["the film was", "a story", "it was not a good film and", "the", "I liked the story . it"]
    rows = [{"prompt": t, "answer": 10.0 + i, "hints": [t[0], i]} for i, t in enumerate(texts)]
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", rows)


REWARDS = """
def answered(answer, **kwargs):
    return list(answer)


def short(completion_ids):
    return [-float(len(ids)) for ids in completion_ids]
"""


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def ppo_config_on_disk(actor_folder, reward_folder, prompts_file, rewards_file):
    """`ppo_config_on_disk(output_dir, **sections)`: a reward model and two functions, two steps, fp32."""

    def make(output_dir, **sections):
        functions = [
            {"function": f"{rewards_file}:answered", "weight": 0.5},
            {"function": f"{rewards_file}:short", "weight": 2.0},
        ]
        values = {
            "output_dir": str(output_dir),
            "max_steps": 2,
            "dtype": "float32",
            "num_logged_samples": 3,
            "data": {"dataset_name": prompts_file, "batch_size": 4},
            "actor": {"model_name_or_path": str(actor_folder), "learning_rate": 1e-3, "logits_chunk": 5},
            "reward": {"model_name_or_path": str(reward_folder), "weight": 3.0, "functions": functions},
            "generation": {"max_completion_length": 6, "num_generations": 2, "top_k": 9},
            "ppo": {"num_mini_batches": 2, "missing_eos_penalty": 1.0},
        }
        return make_config(PPORunConfig, values | sections)

    return make


@pytest.fixture(scope="session")
def pairs_files(tmp_path_factory):
    """Texts with a praising word are preferred to those with a blaming one; held-out pairs are new texts."""
    folder = tmp_path_factory.mktemp("pairs")
    openings = ["the film was", "a story", "it was a", "the story and the film", "not a story . it was"]
    endings = ["", " and it was", " film ."]
    rows = [
        {"prompt": o, "chosen": f" {good}{e}", "rejected": f" {bad}{e}"}
        for o in openings
        for e in endings
        for good, bad in (("good", "bad"), ("great", "dull"), ("good", "dull"))
    ]
    heldout = [
        {"prompt": f"{o} film", "chosen": f" great{e}", "rejected": f" bad{e}"} for o in openings for e in endings
    ]
    return write_rows(folder / "train.jsonl", rows), write_rows(folder / "heldout.jsonl", heldout)


@pytest.fixture(scope="session")
def judged_files(tmp_path_factory):
    """Completions with a praising word are liked, those with a blaming one are not; held-out prompts are new."""
    folder = tmp_path_factory.mktemp("judged")
    openings = ["the film was", "a story", "it was a", "the story and the film", "not a story . it was"]
    words = (("good", True), ("bad", False), ("great", True), ("dull", False))
    rows = [
        {"prompt": o, "completion": f" {word}{e}", "label": label}
        for o in openings
        for e in ("", " and it was", " film .")
        for word, label in words
    ]
    heldout = [
        {"prompt": f"{o} film", "completion": f" {w}", "label": label} for o in openings for w, label in words
    ]
    return write_rows(folder / "train.jsonl", rows), write_rows(folder / "heldout.jsonl", heldout)


@pytest.fixture(scope="session")
def reward_config_on_disk(actor_folder, pairs_files):
    """`reward_config_on_disk(output_dir, **sections)`: starts from the language model."""

    def make(output_dir, **sections):
        values = {
            "output_dir": str(output_dir),
            "max_steps": 25,
            "dtype": "float32",
            "data": {"dataset_name": pairs_files[0], "eval_dataset_name": pairs_files[1], "batch_size": 15},
            "model": {"model_name_or_path": str(actor_folder), "learning_rate": 5e-3},
        }
        return make_config(RewardRunConfig, values | sections)

    return make


@pytest.fixture(scope="session")
def read_lines():
    def read(path):
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return read


@pytest.fixture(scope="session")
def write_jsonl():
    """`write_jsonl(path, rows)` -> the path as text."""
    return write_rows


@pytest.fixture(scope="session")
def demonstrations_files(tmp_path_factory):
    """A praising answer to every opening; held-out openings are new."""
    folder = tmp_path_factory.mktemp("demonstrations")
    openings = ["the film was", "a story", "it was a", "the story and the film", "not a story . it was"]
    endings = [f" {good} {e}" for good in ("good", "great") for e in ".a"]
    rows = [{"prompt": o, "completion": e} for o in openings for e in endings]
    heldout = [{"prompt": f"{o} film", "completion": " good ."} for o in openings]
    return write_rows(folder / "train.jsonl", rows), write_rows(folder / "heldout.jsonl", heldout)


@pytest.fixture(scope="session")
def sft_config_on_disk(actor_folder, demonstrations_files):
    """`sft_config_on_disk(output_dir, **sections)`: 20 texts, 15 steps of 8, fp32."""

    def make(output_dir, **sections):
        train, heldout = demonstrations_files
        values = {
            "output_dir": str(output_dir),
            "max_steps": 15,
            "dtype": "float32",
            "data": {"dataset_name": train, "eval_dataset_name": heldout, "batch_size": 8},
            "model": {"model_name_or_path": str(actor_folder), "learning_rate": 1e-2},
        }
        return make_config(SFTRunConfig, values | sections)

    return make


@pytest.fixture(scope="session")
def dpo_config_on_disk(actor_folder, pairs_files):
    """`dpo_config_on_disk(output_dir, **sections)`: 45 pairs, 12 steps of 15, fp32."""

    def make(output_dir, **sections):
        values = {
            "output_dir": str(output_dir),
            "max_steps": 12,
            "dtype": "float32",
            "data": {"dataset_name": pairs_files[0], "eval_dataset_name": pairs_files[1], "batch_size": 15},
            "actor": {"model_name_or_path": str(actor_folder), "learning_rate": 5e-3},
        }
        return make_config(DPORunConfig, values | sections)

    return make


@pytest.fixture
def reward_config(reward_config_on_disk, tmp_path):
    """Five short steps with a checkpoint after the second and the fourth."""

    def make(name="run", **sections):
        return reward_config_on_disk(tmp_path / name, **(KEPT | sections))

    return make


@pytest.fixture(scope="session")
def spread_files(
    make_folder, actor_folder, reward_folder, prompts_file, pairs_files, demonstrations_files, judged_files
):
    models = {"actor": actor_folder, "reward": reward_folder, "other": make_folder(seed=3)}
    return {
        **{name: str(folder) for name, folder in models.items()},
        "prompts": prompts_file,
        "pairs": pairs_files,
        "demonstrations": demonstrations_files,
        "judged": judged_files,
    }


@pytest.fixture(scope="session")
def make_case(tmp_path_factory, spread_files):
    rewards = tmp_path_factory.mktemp("rewards") / "odd.py"
    rewards.write_text(ODD, encoding="utf-8")
    scoring = {"model_name_or_path": spread_files["actor"], "max_tokens_per_micro_batch": 64, **SMOOTH}
    model = {"logits_chunk": 5, **scoring}
    other = {"model_name_or_path": spread_files["other"]}
    held_out = {"batch_size": 6, "max_eval_samples": 7}
    pairs = {**data_of(spread_files["pairs"]), **held_out}
    texts = data_of(spread_files["demonstrations"])
    given = {
        # With the actor's own weights all margins of the first step are zero, and its accuracy is their rounding.
        DPORunConfig: {"actor": model, "data": pairs, "reference": other},
        KTORunConfig: {"actor": model, "data": data_of(spread_files["judged"]) | held_out, "reference": other},
        ORPORunConfig: {"actor": model, "data": pairs},
        SimPORunConfig: {"actor": model, "data": pairs},
        RewardRunConfig: {"model": scoring, "data": pairs},
        SFTRunConfig: {"model": model, "data": texts | held_out},
    }
    drawn = {
        "data": {"dataset_name": spread_files["prompts"], "batch_size": 4},
        "actor": model,
        "reward": {
            "model_name_or_path": spread_files["reward"],
            "weight": 0.0,
            "functions": [{"function": f"{rewards}:odd"}],
        },
        "generation": {"max_completion_length": 5, "num_generations": 2, "top_k": 9},
        "num_report_prompts": 2,
    }

    given[PPORunConfig] = drawn | {
        "critic": SMOOTH,
        "cost_critic": SMOOTH,
        "cost": {"model_name_or_path": spread_files["reward"], "limit": 0.1},
    }
    given[OnlineDPORunConfig] = drawn | {"reference": other}
    # With the actor's own weights advantages of equal rewards are the rounding of a KL of zero in the first step,
    # and its sign is whether a token counts as clipped.
    given[POLICY["rloo"]] = drawn | {"reference": other}

    def make(case, output_dir, **sections):
        # What was drawn ahead, or a reference that has moved, shows in the third step.
        steps = 3 if {"max_staleness", "reference"} & {*case.sections, *sections} else 2
        values = {"output_dir": str(output_dir), "max_steps": steps, "dtype": "float32", "report_to": []}
        values |= given.get(case.schema, drawn)
        own = {key: values.get(key, {}) | value for key, value in case.sections.items() if isinstance(value, dict)}
        return make_config(case.schema, values | case.sections | own | sections)

    return make
