"""Going on with a run: where it starts, what may have changed since, and an end like that of an unbroken run."""

from pathlib import Path

import pytest
import torch
from broken_runs import KEPT, Notes, changed, end_of
from tiny_rl import tiny_model

from meshift.errors import CheckpointError, ConfigError, DataError, ModelError
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import SamplingParams
from meshift.runtime import run as run_module
from meshift.runtime.dpo_run import run_dpo
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import run_ppo
from meshift.runtime.resume import check_same_run, find_start, replaced
from meshift.runtime.reward_run import run_reward
from meshift.runtime.run_folder import RunFolder


@pytest.fixture
def broken_off(reward_config):
    """A run that was interrupted after its fourth step, past `checkpoint-4`; its config asks to resume."""

    def make(break_after=5, **sections):
        config = reward_config(**sections)
        with pytest.raises(KeyboardInterrupt):
            run_reward(config, Notes(break_after))
        return changed(config, resume=True)

    return make


def test_a_resumed_run_ends_with_the_bytes_of_the_unbroken_one_and_runs_only_what_is_left(
    reward_config, broken_off
):
    whole = run_reward(reward_config("whole"), SilentObserver())
    config = broken_off(break_after=4)  # while checkpoint-4 is not yet written
    notes = Notes()
    resumed = run_reward(config, notes)
    assert notes.steps == [2, 3, 4]
    assert notes.notes == ["going on after step 2, from checkpoint-2"]
    assert end_of(resumed.output_dir) == end_of(whole.output_dir)
    assert whole.metrics["eval/accuracy"] == resumed.metrics["eval/accuracy"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ppo_with_all_that_it_remembers_goes_on_bit_for_bit(ppo_config_on_disk, tmp_path, dtype):
    sections = {
        "dtype": dtype,
        "reference": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2},
        "ppo": {"num_mini_batches": 2, "adaptive_kl": True, "kl_target": 0.1, "kl_horizon": 20},
        **(KEPT | {"max_steps": 4}),
    }
    whole = run_ppo(ppo_config_on_disk(tmp_path / "whole", **sections), SilentObserver())
    config = ppo_config_on_disk(tmp_path / "run", **sections)
    with pytest.raises(KeyboardInterrupt):
        run_ppo(config, Notes(3))
    coefficients = [row["objective/kl_coef"] for row in end_of(whole.output_dir)[1]]
    assert len(set(coefficients)) == 4, "the controller must be at work, or this test could not tell"
    resumed = run_ppo(changed(config, resume=True), SilentObserver())
    assert end_of(resumed.output_dir) == end_of(whole.output_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_completion_does_not_depend_on_what_the_engine_generated_before(dtype):
    """A resumed process has a fresh key-value memory, the unbroken one a used and larger one."""
    model = tiny_model(dtype=dtype)
    params = SamplingParams(max_new_tokens=9, stop_token_ids=(3,))
    prompts = [[1, 2, 5], [4], [7, 7, 7, 7, 1, 2]]
    used = GenerationEngine(model, num_slots=4)
    for seed in range(3):
        long = SamplingParams(max_new_tokens=40 - seed, temperature=3.0)
        used.generate([[2] * 9, [5], [1, 1]], long, seed=seed, num_generations=3)
    fresh = GenerationEngine(model, num_slots=4)
    assert used.num_kept_bytes > fresh.num_kept_bytes
    one, two = (engine.generate(prompts, params, seed=7, num_generations=3) for engine in (used, fresh))
    assert [(c.tokens, c.logprobs) for c in one] == [(c.tokens, c.logprobs) for c in two]


def test_lines_of_steps_that_run_again_and_torn_lines_go(tmp_path):
    run = tmp_path / "run"
    with RunFolder(run, []) as folder:
        for step in (1, 2, 3):
            folder.write_metrics(step, {"loss": step})
            folder.write_samples([{"step": step, "prompt": f"{step} \u2028 \x85"}] * 2)
    metrics, samples = (
        (run / name).read_bytes().splitlines(keepends=True) for name in ("metrics.jsonl", "samples.jsonl")
    )
    for name in ("metrics.jsonl", "samples.jsonl"):
        (run / name).write_bytes((run / name).read_bytes() + b'{"training/global_step": 2, "ste')
    with RunFolder(run, [], num_done=2):
        pass
    assert (run / "metrics.jsonl").read_bytes() == b"".join(metrics[:2])
    assert (run / "samples.jsonl").read_bytes() == b"".join(samples[:4])


def test_curves_of_a_resumed_run_have_each_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for num_done, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        with RunFolder(tmp_path, ["tensorboard"], num_done=num_done) as folder:
            for step in steps:
                folder.write_metrics(step, {"loss": step + num_done / 2})
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert [(e.step, e.value) for e in curves.Scalars("loss")] == [(1, 1.0), (2, 2.5), (3, 3.5), (4, 4.5)]


def test_a_torn_checkpoint_is_passed_over_with_a_warning(broken_off, reward_config):
    config = broken_off()
    run = Path(config.output_dir)
    file = run / "checkpoint-4" / "reward" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    notes = Notes()
    run_reward(config, notes)
    assert f"{file} has " in notes.notes[0]
    assert notes.notes[0].endswith("; going on from checkpoint-2 instead")
    assert end_of(run) == end_of(run_reward(reward_config("whole"), SilentObserver()).output_dir)


def test_only_broken_checkpoints_are_an_error_that_names_each(broken_off):
    config = broken_off()
    run = Path(config.output_dir)
    for step in (2, 4):
        (run / f"checkpoint-{step}" / "manifest.json").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"checkpoint-4/manifest\.json is missing; .*checkpoint-2/manifest"):
        run_reward(config, SilentObserver())
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_run_without_a_checkpoint_starts_again_and_leaves_nothing_of_its_first_start(broken_off, reward_config):
    config = broken_off(break_after=1)
    notes = Notes()
    result = run_reward(config, notes)
    assert notes.notes == [f"{config.output_dir} has no checkpoint yet; the run starts again at its first step"]
    assert end_of(result.output_dir) == end_of(run_reward(reward_config("whole"), SilentObserver()).output_dir)


def test_resume_in_a_folder_that_is_not_there_starts_the_run(reward_config):
    notes = Notes()
    run_reward(changed(reward_config(), resume=True, max_steps=1), notes)
    assert "there is nothing to resume in" in notes.notes[0]
    assert notes.steps == [0]


def test_a_finished_run_is_not_run_again(reward_config):
    config = reward_config()
    first = run_reward(config, SilentObserver())
    before = {path: path.stat().st_mtime_ns for path in first.output_dir.rglob("*")}
    notes = Notes()
    again = run_reward(changed(config, resume=True), notes)
    assert notes.notes == [f"the run in {config.output_dir} is finished; there is nothing left to do"]
    assert notes.steps == []
    assert again.final_dir == first.final_dir
    assert again.metrics["loss"] == first.metrics["loss"]
    assert {path: path.stat().st_mtime_ns for path in first.output_dir.rglob("*")} == before
    with pytest.raises(ConfigError, match="is finished, and cannot be made longer"):
        run_reward(changed(config, resume=True, max_steps=9), SilentObserver())


def test_a_kill_between_two_models_is_no_finished_run(ppo_config_on_disk, tmp_path):
    """`final` comes last: with only `final_critic` there, the run goes on and writes both."""
    config = ppo_config_on_disk(tmp_path / "run", save_steps=1, report_to=[])
    whole = end_of(run_ppo(config, SilentObserver()).output_dir)
    (tmp_path / "run" / "final").rename(tmp_path / "elsewhere")
    (tmp_path / "run" / "final_critic" / "config.json").write_text("stale")
    run_ppo(changed(config, resume=True), SilentObserver())
    assert end_of(tmp_path / "run") == whole


def with_section(config, section, **keys):
    return changed(config, **{section: changed(getattr(config, section), **keys)})


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_a_key_that_would_make_it_another_run_is_refused_by_name(broken_off, with_checkpoint):
    config = broken_off(break_after=3 if with_checkpoint else 1)
    with pytest.raises(ConfigError, match=r"`seed` was 0 in .* and is 1 now: a resumed run must be the same"):
        run_reward(changed(config, seed=1), SilentObserver())
    with pytest.raises(ConfigError, match=r"`model\.learning_rate` was 0\.005 in .* and is 0\.1 now"):
        run_reward(with_section(config, "model", learning_rate=0.1), SilentObserver())
    with pytest.raises(ConfigError, match=r"`data\.batch_size` was 15 in "):
        run_reward(with_section(config, "data", batch_size=3), SilentObserver())


def test_keys_about_logging_may_change_and_those_about_memory_with_a_note(broken_off):
    config = changed(broken_off(), save_steps=1, save_total_limit=None, num_logged_samples=0)
    assert [note for note in find_start(config).notes if "was" in note] == []
    config = with_section(config, "model", max_tokens_per_micro_batch=64)
    (note,) = (note for note in find_start(config).notes if "was" in note)
    assert note.startswith("`model.max_tokens_per_micro_batch` was 4096 in ")
    assert "may differ in its last bits" in note


def test_a_run_with_a_constant_rate_can_be_made_longer_and_equals_the_long_run(broken_off, reward_config):
    config = changed(broken_off(break_after=3), max_steps=7)
    longer = run_reward(config, SilentObserver())
    whole = run_reward(reward_config("whole", max_steps=7), SilentObserver())
    assert end_of(longer.output_dir) == end_of(whole.output_dir)


def test_a_decaying_rate_fixes_the_number_of_steps(broken_off, actor_folder):
    model = {"model_name_or_path": str(actor_folder), "lr_scheduler_type": "linear"}
    config = broken_off(model=model)
    with pytest.raises(
        ConfigError, match=r"had 5 steps and is to have 7 now, but `model\.lr_scheduler_type` spreads"
    ):
        run_reward(changed(config, max_steps=7), SilentObserver())
    with pytest.raises(ConfigError, match=r"is to have 3 steps, but .*checkpoint-4 is after more"):
        run_reward(changed(config, max_steps=3), SilentObserver())
    assert run_reward(changed(config, max_steps=4), SilentObserver()).final_dir.is_dir(), "ended where it stands"


def test_changed_data_are_found_out(broken_off, tmp_path, pairs_files):
    copy = tmp_path / "pairs.jsonl"
    rows = Path(pairs_files[0]).read_text().splitlines(keepends=True)
    copy.write_text("".join(rows))
    config = broken_off(data={"dataset_name": str(copy), "batch_size": 15})
    copy.write_text("".join(rows[:-1]))
    with pytest.raises(DataError, match=r"step 4 would get other rows"):
        run_reward(config, SilentObserver())
    copy.write_text("".join(rows))
    run_reward(config, SilentObserver())


def test_a_row_that_no_step_has_read_yet_may_not_change_either(ppo_config_on_disk, prompts_file, tmp_path):
    """One batch of five rows is done, of two: the last batch cannot show what the next one will read."""
    copy = tmp_path / "prompts.jsonl"
    rows = Path(prompts_file).read_text()
    copy.write_text(rows)
    data = {"dataset_name": str(copy), "batch_size": 2, "shuffle": False}
    config = ppo_config_on_disk(tmp_path / "run", data=data, **(KEPT | {"save_steps": 1}))
    with pytest.raises(KeyboardInterrupt):
        run_ppo(config, Notes(2))
    config = changed(config, resume=True)
    for old, new in (("10.0", "11.0"), ("the film was", "the film is"), ("I liked the story", "I liked a story")):
        copy.write_text(rows.replace(old, new))
        assert copy.read_text() != rows
        with pytest.raises(DataError, match=r"the data are not those that .*checkpoint-1 was trained on"):
            run_ppo(config, SilentObserver())
    copy.write_text(rows.replace('"answer": 14.0', '"answer": 15.0'))
    with pytest.raises(DataError, match="a row of another step, its text or its tokens are others"):
        run_ppo(config, SilentObserver())
    copy.unlink()
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text("\n" + rows)
    copy.symlink_to(moved)
    run_ppo(config, SilentObserver())


def test_metrics_that_were_deleted_are_said_to_be_gone(broken_off):
    config = broken_off()
    metrics = Path(config.output_dir) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:1] + lines[2:]))
    assert f"{metrics} lacks 1 of the 4 steps that are done (step 2 ...); it stays so" in find_start(config).notes
    metrics.write_text("[1]\nnonsense\n")
    run_reward(config, SilentObserver())
    assert metrics.read_text().count("\n") == 1, "that of step 5"
    again = run_reward(config, SilentObserver())
    assert again.metrics["training/global_step"] == 5


def test_a_run_of_another_command_is_named_as_such(broken_off, sft_config_on_disk):
    for config in (broken_off(), broken_off(break_after=1, overwrite_output_dir=True)):
        other = sft_config_on_disk(config.output_dir, resume=True)
        with pytest.raises(ConfigError, match=r"of a run by Reward, and this one is by SFT;|of no SFT run \("):
            find_start(other)


def test_a_checkpoint_has_its_config_and_needs_no_other(broken_off):
    config = broken_off()
    file = Path(config.output_dir) / "config.yaml"
    file.write_text(file.read_text().splitlines()[0] + "\nnonsense: 1\n")
    assert find_start(config).num_done == 4
    for name in ("checkpoint-2", "checkpoint-4"):
        (Path(config.output_dir) / name).rename(Path(config.output_dir) / f"old-{name}")
    (Path(config.output_dir) / "LATEST").unlink()
    with pytest.raises(ConfigError, match=r"its config\.yaml is of no Reward run \(unknown key `nonsense`"):
        find_start(config)


def test_a_changed_model_that_the_run_only_reads_is_found_out(ppo_config_on_disk, make_folder, tmp_path):
    reference = make_folder(seed=8)
    config = ppo_config_on_disk(
        tmp_path / "run", reference={"model_name_or_path": str(reference)}, save_steps=1, report_to=[]
    )
    with pytest.raises(KeyboardInterrupt):
        run_ppo(config, Notes(2))
    weights = (make_folder(seed=9) / "model.safetensors").read_bytes()
    (reference / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match="the reference model is not the one"):
        run_ppo(changed(config, resume=True), SilentObserver())


def test_a_reference_that_was_read_in_advance_and_has_changed_since_would_pass(
    dpo_config_on_disk, make_folder, tmp_path
):
    reference = make_folder(seed=8)
    sections = {"reference": {"model_name_or_path": str(reference)}, "dpo": {"precompute_ref_log_probs": True}}
    config = dpo_config_on_disk(tmp_path / "run", save_steps=1, report_to=[], **sections)
    with pytest.raises(KeyboardInterrupt):
        run_dpo(config, Notes(2))
    (reference / "model.safetensors").write_bytes((make_folder(seed=9) / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="the reference model is not the one"):
        run_dpo(changed(config, resume=True), SilentObserver())


def test_what_a_failed_reward_function_advises_would_be_refused(ppo_config_on_disk, tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def judge(completions):\n    return [1.0] * len(completions)\n")
    first, other = ({"function": f"{path}:judge", "weight": weight, "timeout_s": 60.0} for weight in (1.0, 0.5))

    def config(*functions):
        return ppo_config_on_disk(tmp_path / "run", save_steps=1, reward={"functions": list(functions)})

    begun = config(first, other)
    patient = config(first | {"timeout_s": 90.0}, other | {"on_error": "skip"})
    assert check_same_run(begun, patient, "there") == ()
    with pytest.raises(ConfigError, match=r"`reward\.functions\[1\]\.weight` was 0\.5 in there and is 0\.6 now"):
        check_same_run(begun, config(first, other | {"weight": 0.6}), "there")


def test_another_compute_type_is_found_out_though_the_config_says_auto(broken_off, monkeypatch):
    config = changed(broken_off(), dtype="float32")
    monkeypatch.setattr("meshift.runtime.reward_run.compute_dtype", lambda name: torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"the reward computed in float32, .* set dtype=float32 to go on"):
        run_reward(config, SilentObserver())


def test_another_number_of_threads_is_said(broken_off, monkeypatch):
    config = broken_off()
    monkeypatch.setattr(run_module, "environment", lambda: {"num_threads": "77", "torch": str(torch.__version__)})
    notes = Notes()
    run_reward(config, notes)
    (note,) = (note for note in notes.notes if "77" in note)
    assert note.startswith(
        f"num_threads was {torch.get_num_threads()} when checkpoint-4 was written and is 77 now"
    )


def test_the_folder_of_something_else_is_refused_and_left_alone(reward_config, tmp_path):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot resume in .*: it holds a model in final/, but no config\.yaml"):
        run_reward(changed(reward_config(), resume=True), SilentObserver())
    assert (run / "config.yaml").read_text() == "mine"


def test_overwriting_removes_the_checkpoints_of_the_old_run(broken_off):
    config = changed(broken_off(), resume=False, overwrite_output_dir=True, max_steps=1, save_steps=None)
    run_reward(config, SilentObserver())
    assert not list(Path(config.output_dir).glob("checkpoint-*"))
    assert not (Path(config.output_dir) / "LATEST").exists()


def test_a_finished_run_would_be_lost_to_another_one_without_a_word(reward_config):
    """As one that it is to be compared with, where a recipe overwrites and the command has another plan."""
    config = changed(reward_config(), max_steps=1, save_steps=None, overwrite_output_dir=True)
    run_reward(config, SilentObserver())
    again, other = Notes(), Notes()
    run_reward(changed(config, num_logged_samples=2), again)
    assert [note for note in again.notes if "finished run" in note] == [], "it is the same run"
    run_reward(changed(config, seed=3), other)
    [note] = [note for note in other.notes if "finished run" in note]
    assert note.startswith(
        f"{config.output_dir} holds a finished run with another `seed`, which overwrite_output_dir"
    )
    planned = changed(config, seed=3).model_dump() | {"plan": {"reward": {"train": {"mesh": "1", "layout": "d1"}}}}
    assert "another `plan`, which" in replaced(type(config).model_validate(planned))[0]
    assert replaced(changed(config, seed=5, resume=True)) == ()
