"""A profile has all that the planner asks for, of the engines' own code, and a plan is made from its file."""

import json
import time

import pytest
import torch

from meshift.cli.main import main
from meshift.counted import heard_by
from meshift.models.hf.families import read_config
from meshift.planner.hardware import find_hardware
from meshift.planner.profile import PRODUCTS, SPEEDS
from meshift.runtime.observer import SilentObserver
from meshift.runtime.profiling.models import Effort, made, narrowed, numbers_of_layer, timed
from meshift.runtime.profiling.products import Work, products, speeds
from meshift.runtime.profiling.profile import Asked, measure, named_hardware, write

TINY = Effort(rows=(8, 32), live=(1, 4), cuts=(1, 2), layers=2, ranks=(2, 4), seconds=0.01, repeats=1)
RAW = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
CPU = torch.device("cpu")


def config():
    return read_config(dict(RAW), "a test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_work_is_measured_at_every_size(dtype):
    work = Work(model=made(narrowed(config(), 1, 2), dtype, CPU), effort=TINY)
    found = list(products(work))
    for kind in PRODUCTS:
        rows = [one.rows for one in found if one.kind == kind]
        assert len(rows) == 2, kind
    for kind, rank in (("frozen", 0), ("beside", 2), ("beside", 4), ("beside_back", 2), ("beside_back", 4)):
        rows = [one.rows for one in found if (one.kind, one.rank) == (kind, rank)]
        assert rows == [8, 32], kind
    widths = {one.numbers / one.rank for one in found if one.kind == "beside"}
    assert widths == {64 + 64 + 2 * (64 + 32) + 64 + 64 + 3 * (64 + 128)}
    assert not any(name.endswith("lora_a") for name, _ in work.model.named_parameters())
    assert all(one.rate > 0 and one.dtype == str(dtype).removeprefix("torch.") for one in found)
    assert set(speeds(work)) == set(SPEEDS) - ({"pack"} if "pack" not in speeds(work) else set())


def test_a_tensor_ranks_layers_are_narrower_by_its_part():
    whole, half = (made(narrowed(config(), cut, 2), torch.float32, CPU) for cut in (1, 2))
    norms = 2 * 64
    assert numbers_of_layer(whole) - norms == 2 * (numbers_of_layer(half) - norms)
    assert len(half.layers) == 2
    eighth = narrowed(config(), 8, 2)
    assert (eighth.num_heads, eighth.num_kv_heads) == (1, 1)


def test_a_clock_gives_what_a_call_takes():
    effort = Effort(seconds=0.05, repeats=3)
    assert timed(lambda: time.sleep(0.01), CPU, effort) == pytest.approx(0.01, rel=0.5)


def test_the_bar_of_a_measurement_would_end_too_early_or_too_late(monkeypatch):
    monkeypatch.setattr("meshift.counted.PATIENCE_S", 0.0)
    told = []
    with heard_by(lambda *count: told.append(count)):
        found = measure(Asked(config=config(), num_processes=1, effort=TINY)).profile.products
    counts = [one for one in told if one[0] == "measurements"]
    assert counts[0][2] == counts[-1][1] == len(found)


def test_measuring_leaves_threads_as_they_were():
    before = torch.get_num_threads()
    measure(Asked(config=config(), num_processes=1, effort=TINY))
    assert torch.get_num_threads() == before


def test_this_machine_is_measured_once_and_then_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path))
    asked = []

    def measured(given, observer=None):
        asked.append(given)
        return measure(Asked(config=config(), num_processes=1, effort=TINY, dtypes=given.dtypes))

    monkeypatch.setattr("meshift.runtime.profiling.profile.measure", measured)
    monkeypatch.setattr("meshift.runtime.profiling.profile._others", lambda: 0.0)
    first, second = named_hardware("cpu"), named_hardware("cpu")
    assert len(asked) == 1
    assert first.profile.products == second.profile.products
    named_hardware("cpu", ("bfloat16",))
    assert len(asked) == 2
    assert named_hardware("h100").profile is None


def test_what_is_measured_beside_other_work_is_told_and_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHIFT_CACHE", str(tmp_path))
    monkeypatch.setattr("meshift.runtime.profiling.profile._others", lambda: 1.5)
    tiny = Asked(config=config(), num_processes=1, effort=TINY)
    monkeypatch.setattr("meshift.runtime.profiling.profile.Asked", lambda **given: tiny)
    heard = []
    listener = SilentObserver()
    listener.on_message = heard.append
    assert named_hardware("cpu", observer=listener).profile.others == 1.5
    assert "other work took 1.5 processors meanwhile" in heard[-1]
    assert not list(tmp_path.rglob("cpu-*.json"))


@pytest.mark.slow
def test_processes_beside_each_other_are_measured_and_a_plan_goes_by_the_profile(tmp_path, capsys):
    listener, heard = SilentObserver(), []
    listener.on_message = heard.append
    hardware = measure(Asked(config=config(), num_processes=3, effort=TINY), listener)
    assert heard.count("messages between processes") == 1, "which one of them says for all"
    profile = hardware.profile
    for kind in ("decode", "forward", "backward", "update"):
        assert set(profile.crowding[kind]) == {"1", "2", "3"}
        assert profile.crowding[kind]["1"] == 1.0
    for kind in ("sum", "late", "gather"):
        assert {(one.members, one.among) for one in profile.messages if one.kind == kind} == {(2, 2), (3, 3)}
    assert all(one.seconds > 0 for one in profile.messages)
    file, model, run = tmp_path / "profile.json", tmp_path / "model", tmp_path / "run.yaml"
    write(hardware, file)
    assert find_hardware(str(file)).profile.messages == profile.messages
    assert main(plan_words(model, run, file, "3", "dtype=float32")) == 0
    assert "train_critic" in capsys.readouterr().out


def plan_words(model, run, file, devices, *more):
    model.mkdir()
    (model / "config.json").write_text(json.dumps(RAW))
    run.write_text(
        f"output_dir: runs/x\ndata: {{dataset_name: x.jsonl, batch_size: 16}}\n"
        f"actor: {{model_name_or_path: {model}}}\nreward: {{model_name_or_path: {model}}}\n"
    )
    words = ["plan", "--config", str(run), "--command", "ppo", "--devices", devices]
    return [*words, "--hardware", str(file), "--seconds", "2", *more]


@pytest.mark.parametrize(("dtype", "said"), [("float32", True), ("bfloat16", False)])
def test_what_profile_writes_without_options_would_be_of_no_use_to_plan(tmp_path, capsys, dtype, said):
    """`dtype: auto` is float32 where a processor has no bfloat16: so it is measured, and so it is planned."""
    file = tmp_path / "profile.json"
    write(measure(Asked(config=config(), num_processes=1, effort=TINY, dtypes=(dtype,))), file)
    assert main(plan_words(tmp_path / "model", tmp_path / "run.yaml", file, "1")) == 0
    assert ("All figures are in float32" in capsys.readouterr().out) == said


def test_a_profile_in_no_json_file_is_refused_before_anything_is_measured(capsys):
    assert main(["profile", "--out", "profile.txt"]) == 2
    assert "profile.txt" in capsys.readouterr().err
    assert main(["profile", "--processes", "0"]) == 2
    assert "--processes 0" in capsys.readouterr().err
