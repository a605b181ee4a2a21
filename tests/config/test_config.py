"""The config: whatever is misspelt, missing or of the wrong type is named, and nothing is silently ignored."""

from typing import get_args

import pytest
import yaml

from meshift.config.loading import describe_keys, dump_config, load_config, make_config
from meshift.config.plan import PPOPlan
from meshift.config.runs import DPORunConfig, PPORunConfig, RewardRunConfig, SFTRunConfig
from meshift.config.section import Section
from meshift.errors import ConfigError

MINIMAL = """\
output_dir: runs/x
data:
  dataset_name: prompts.jsonl
actor:
  model_name_or_path: some/model
reward:
  functions:
    - function: rewards.py:length
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(MINIMAL)
    return file


def load(path, *overrides):
    return load_config(PPORunConfig, path, overrides)


def sentence(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def rewrite(path, old, new):
    assert old in MINIMAL
    path.write_text(MINIMAL.replace(old, new))


def test_a_minimal_file_gets_the_documented_defaults(path):
    config = load(path)
    assert config.actor.learning_rate == 1e-5
    assert config.reward.functions[0].function == "rewards.py:length"
    assert config.overwrite_output_dir is False


def test_a_misspelt_key_gets_the_sentence_of_the_issue(path):
    expected = "unknown key `actor.lerning_rate`; did you mean `actor.learning_rate`?"
    assert sentence(path, "actor.lerning_rate=1e-5") == expected
    rewrite(path, "actor:\n", "actor:\n  lerning_rate: 1.0e-5\n")
    assert sentence(path) == expected


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("learning_rate=1", "actor.learning_rate"),
        ("ppo.kl_coeff=1", "ppo.kl_coef"),
        ("generation.topk=1", "generation.top_k"),
        ("otput_dir=x", "output_dir"),
        ("kl_coef=0.1", "ppo.kl_coef"),
    ],
)
def test_a_key_in_the_wrong_place_or_spelling_gets_its_right_one(path, override, suggested):
    key = override.partition("=")[0]
    assert sentence(path, override) == f"unknown key `{key}`; did you mean `{suggested}`?"


def test_a_key_like_no_other_points_to_the_list(path):
    assert sentence(path, "zzzzzz=1") == "unknown key `zzzzzz`; --help-config lists the keys"


def test_a_misspelt_key_of_a_list_item_is_named_with_its_place(path):
    rewrite(path, "length\n", "length\n      wieght: 2\n")
    expected = "unknown key `reward.functions[0].wieght`; did you mean `reward.functions[].weight`?"
    assert sentence(path) == expected


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("actor.learning_rate=fast", ["`actor.learning_rate`", "number", "'fast'"]),
        ("actor.learning_rate=-1", ["`actor.learning_rate`", "greater than 0", "-1"]),
        ("max_steps=0", ["`max_steps`", "greater than or equal to 1", "0"]),
        ("max_steps=2.5", ["`max_steps`", "integer", "2.5"]),
        ("ppo.kl_estimator=k4", ["`ppo.kl_estimator`", "'k1', 'k2' or 'k3'", "'k4'"]),
        ("data=3", ["`data`", "3"]),
        ("generation.min_new_tokens=500", ["min_new_tokens must not be above max_completion_length"]),
        ("ppo.num_mini_batches=65", ["`ppo.num_mini_batches` = 65", "64 sequences"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_was_expected(path, override, parts):
    text = sentence(path, override)
    assert all(part in text for part in parts), text


def test_missing_keys_are_named(path):
    rewrite(path, "  dataset_name: prompts.jsonl\n", "  batch_size: 4\n")
    assert "`data.dataset_name` is needed" in sentence(path)
    rewrite(path, "  model_name_or_path: some/model\n", "  learning_rate: 0.1\n")
    assert "`actor.model_name_or_path` is needed" in sentence(path)
    rewrite(path, "    - function: rewards.py:length\n", "    []\n")
    assert "a reward is needed" in sentence(path)


def test_broken_yaml_is_named_with_its_line(path):
    path.write_text("output_dir: x\ndata: [1, 2\nactor: {}\n")
    assert f"{path}, line 3 is not valid YAML" in sentence(path)


def test_a_key_given_twice_in_the_file_is_not_silently_decided(path):
    rewrite(path, "actor:\n", "actor:\n  learning_rate: 1.0e-5\n  learning_rate: 1.0e-3\n")
    text = sentence(path)
    assert f"{path}, line 6" in text
    assert "`learning_rate`" in text


def test_files_that_are_no_config_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no config file .*absent.yaml"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold keys and values, not a list"):
        load(tmp_path / "list.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("? [1, 2]\n: 3\n", "line 1 is not valid YAML: a key must be a word"),
        ("output_dir: 2024-13-45\n", "is not valid YAML: month must be"),
        ("data: " + "[" * 5000, "is not valid YAML: it is nested too deeply"),
        ('output_dir: "a\\0b"\n', "`output_dir` holds a NUL character"),
        ('output_dir: x\nactor: {}\ndata: {dataset_name: "a\\0b"}\n', "`dataset_name` holds a NUL character"),
    ],
)
def test_yaml_that_no_value_can_be_made_of_is_no_traceback(path, text, problem):
    path.write_text(text)
    assert problem in sentence(path)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("output_dir=2024-13-45", "'output_dir=2024-13-45' is not valid YAML (month must be"),
        ("data=" + "[" * 5000, "nested too deeply"),
        ("data={[1, 2]: 3}", "a key must be a word"),
        ("max_steps=" + "9" * 5000, "is not valid YAML"),
    ],
)
def test_an_override_that_no_value_can_be_made_of_is_no_traceback(path, override, problem):
    text = sentence(path, override)
    assert problem in text
    assert len(text) < 300


def test_a_nul_in_the_configs_path_is_no_traceback():
    assert "cannot read the config file" in sentence("a\0b.yaml")


def test_overrides_win_over_the_file_and_the_last_over_the_first(path):
    config = load(path, "output_dir=a", "actor.learning_rate=1e-5", "output_dir=b", "max_steps=3")
    assert (config.output_dir, config.max_steps, config.actor.learning_rate) == ("b", 3, 1e-5)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-3", 1e-3), ("0.5", 0.5), ("3e0", 3.0), ("1.5e-06", 1.5e-6)]
)
def test_numbers_on_the_command_line_are_numbers(path, text, value):
    assert load(path, f"actor.learning_rate={text}").actor.learning_rate == value


def test_numbers_with_exponents_in_a_file_are_numbers(path):
    rewrite(path, "actor:\n", "actor:\n  learning_rate: 1e-4\n")
    assert load(path).actor.learning_rate == 1e-4


def test_null_lists_and_values_with_equals_signs_can_be_given(path):
    config = load(path, "ppo.cliprange_value=null", "report_to=[]", "output_dir=runs/a=b")
    assert (config.ppo.cliprange_value, config.report_to, config.output_dir) == (None, [], "runs/a=b")
    functions = load(path, "reward.functions=[{function: a.py:f, weight: 2}]").reward.functions
    assert [(f.function, f.weight) for f in functions] == [("a.py:f", 2.0)]


@pytest.mark.parametrize("override", ["max_steps", "=3", "output_dir.x=3", "data=[1"])
def test_an_override_that_cannot_be_read_is_quoted(path, override):
    assert repr(override) in sentence(path, override)


def test_a_section_that_is_misspelt_is_named_once_and_not_key_by_key(path):
    assert sentence(path, "generaton.top_k=1") == "unknown key `generaton`; did you mean `generation`?"


@pytest.mark.parametrize("value", ["nan", "inf", ".nan"])
def test_no_number_may_be_nan_or_infinite(path, value):
    assert "`reward.weight`" in sentence(path, f"reward.weight={value}")


def test_an_empty_section_means_its_defaults(path):
    path.write_text(MINIMAL + "ppo:\n")
    assert load(path) == load_config(PPORunConfig, path, ["ppo.kl_coef=0.1"])


def test_the_dumped_config_loads_to_the_same_config(path, tmp_path):
    config = load(path, "actor.learning_rate=3e-7", "ppo.dual_clip=3")
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load(again) == config


def test_a_config_cannot_be_changed_after_validation(path):
    with pytest.raises(ValueError, match="frozen"):
        load(path).max_steps = 3


@pytest.mark.parametrize("schema", [SFTRunConfig, RewardRunConfig, DPORunConfig, PPORunConfig])
def test_every_key_is_described_and_every_described_key_exists(schema):
    rows = list(describe_keys(schema))
    assert not [key for key, _, description in rows if not description]
    for key, default, _ in rows:
        if "[]" not in key and default != "required":
            *sections, leaf = key.split(".")
            owner, may_be_left_out = schema, False
            for name in sections:
                kind = owner.model_fields[name].annotation
                owner = next((part for part in get_args(kind) if part is not type(None)), kind)
                may_be_left_out |= owner is not kind
            assert yaml.safe_load(default) == (None if may_be_left_out else owner.model_fields[leaf].default)


def test_choices_are_listed():
    described = {key: description for key, _, description in describe_keys(PPORunConfig)}
    assert described["ppo.kl_estimator"].endswith("(k1, k2, k3)")


def test_a_nested_dictionary_is_validated_like_a_file():
    with pytest.raises(ConfigError, match="unknown key `x`"):
        make_config(Section, {"x": 1})


def test_offload_that_is_switched_off_would_be_a_plan():
    plans = [PPOPlan.model_validate({"actor": given}) for given in ({"offload": False}, {"offload": True}, {})]
    assert [set(plan.roles) for plan in plans] == [set(), {"actor"}, {"actor"}]
    assert [plan.is_given for plan in plans] == [False, False, True]
