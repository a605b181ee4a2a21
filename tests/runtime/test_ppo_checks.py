"""What `meshift ppo` finds before it trains: in a dry run and in a run alike, and before an old run is removed."""

import pytest

from meshift.config.sections import RewardFunctionConfig
from meshift.errors import ConfigError, DataError, ModelError
from meshift.rewards.configured import check_columns
from meshift.rewards.functions import WeightedFunction
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import build_ppo_job, check_ppo, run_ppo
from meshift.runtime.run_folder import CONFIG_HEADER

CHECKS = pytest.mark.parametrize("start", [check_ppo, build_ppo_job])


@pytest.fixture
def old_run(tmp_path):
    """The folder of a finished run, and what it holds."""
    folder = tmp_path / "old"
    (folder / "final").mkdir(parents=True)
    for name in ("metrics.jsonl", "config.yaml", "samples.jsonl", "final/model.safetensors"):
        (folder / name).write_text(f"{CONFIG_HEADER}\n" if name == "config.yaml" else "{}\n")
    return folder, lambda: {str(path): path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "section", [{"actor": "/no/model"}, {"reward": "/no/model"}, {"data": "/no/prompts.jsonl"}]
)
def test_an_old_run_outlives_a_new_one_that_cannot_start(ppo_config_on_disk, old_run, actor_folder, section):
    folder, content = old_run
    before = content()
    ((name, path),) = section.items()
    values = {name: {"dataset_name" if name == "data" else "model_name_or_path": path}}
    config = ppo_config_on_disk(folder, overwrite_output_dir=True, **values)
    with pytest.raises((ModelError, DataError)):
        run_ppo(config, SilentObserver())
    assert content() == before


def test_a_run_that_would_delete_its_own_actor_is_refused(ppo_config_on_disk, old_run):
    folder, content = old_run
    before = content()
    actor = {"model_name_or_path": str(folder / "final")}
    config = ppo_config_on_disk(folder, overwrite_output_dir=True, actor=actor)
    for start in (check_ppo, build_ppo_job, lambda config: run_ppo(config, SilentObserver())):
        with pytest.raises(ConfigError, match=r"`actor\.model_name_or_path` .* lies in `output_dir`"):
            start(config)
    assert content() == before


@CHECKS
def test_a_prompt_that_leaves_no_room_for_its_completion_is_named(ppo_config_on_disk, tmp_path, start):
    """The third prompt has 7 tokens; the models take 64."""
    start(ppo_config_on_disk(tmp_path, generation={"max_completion_length": 57}))
    config = ppo_config_on_disk(tmp_path, generation={"max_completion_length": 58})
    with pytest.raises(DataError, match=r"prompts\.jsonl:3: the prompt's 7 tokens .* = 58 make 65, .* takes 64"):
        start(config)


@CHECKS
@pytest.mark.parametrize("role", ["actor", "critic"])
def test_more_frozen_layers_than_there_are_is_named_with_its_role(
    ppo_config_on_disk, actor_folder, tmp_path, start, role
):
    section = {"model_name_or_path": str(actor_folder), "num_frozen_layers": 3}
    with pytest.raises(ConfigError, match=rf"`{role}\.num_frozen_layers` = 3, but .* has 2 layers"):
        start(ppo_config_on_disk(tmp_path, **{role: section}))


@CHECKS
def test_a_reward_function_without_its_column_is_refused(ppo_config_on_disk, tmp_path, start):
    path = tmp_path / "rewards_of_columns.py"
    path.write_text("def judge(completions, solution):\n    return [0.0] * len(completions)\n", encoding="utf-8")
    functions = [RewardFunctionConfig(function=f"{path}:judge").model_dump()]
    with pytest.raises(ConfigError, match=r"judge needs 'solution', .*besides prompt: answer, .*hints"):
        start(ppo_config_on_disk(tmp_path / "run", reward={"functions": functions}))


def test_what_a_function_is_given_or_does_not_need_is_not_asked_of_the_data():
    def everything(prompts, completions, completion_ids, answer, other=3, *rest, **columns):
        pass

    def check(function, *columns):
        check_columns([WeightedFunction(name="f", function=function, weight=1.0)], columns)

    check(everything, "prompt", "answer")
    with pytest.raises(ConfigError, match=r"needs 'answer'.*besides prompt: none"):
        check(everything, "prompt")
    with pytest.raises(ConfigError, match="needs 'prompt'"):
        check(lambda completions, prompt: [], "prompt")
    for strange in (print, lambda prompt: []):
        with pytest.raises(ConfigError, match="f has none of the parameter lists that are known"):
            check(strange, "prompt")


def test_over_long_prompts_are_reported_with_the_first_of_them(ppo_config_on_disk, prompts_file, tmp_path):
    data = {"dataset_name": prompts_file, "batch_size": 2, "max_prompt_length": 5}
    config = ppo_config_on_disk(tmp_path, data=data)
    (message,) = build_ppo_job(config).messages
    assert message.startswith("2 prompts over data.max_prompt_length left out, the first at ")
    assert message.endswith("prompts.jsonl:3")
    assert dict(check_ppo(config))["prompts"].endswith("prompts.jsonl:3)")


def test_a_step_gets_its_prompts_whatever_was_asked_for_before(ppo_config_on_disk, tmp_path):
    config = ppo_config_on_disk(tmp_path)
    begun, resumed = build_ppo_job(config), build_ppo_job(config)
    batches = [begun.next_batch(step) for step in range(3)]
    again = resumed.next_batch(2)
    assert again["prompts"].values.tolist() == batches[2]["prompts"].values.tolist()
    assert again["index"].values.tolist() == batches[2]["index"].values.tolist()
