"""The page: whole, self-contained, safe, and there for runs that are not finished or not well."""

import base64
import hashlib
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import meshift
from meshift.config.loading import dump_config, load_config
from meshift.config.policy_runs import GRPORunConfig
from meshift.config.runs import PPORunConfig
from meshift.errors import ConfigError, InputError
from meshift.report.catalogue import charts_for
from meshift.report.differences import differences
from meshift.report.run_data import name_runs, read_run
from meshift.report.write import write_report
from meshift.rewards.configured import TAKEN

RUN_KEYS = ("output_dir", "data.dataset_name", "actor.model_name_or_path", "reward.model_name_or_path")
VOID = {"meta", "br", "hr", "link", "input", "path", "line", "rect", "circle"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'>]]>--> \u202e \ud800 \x00"


class Checked(HTMLParser):
    """Refuses tags that do not match; collects elements and texts."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parsed(path):
    page = Checked()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert not page.open
    return page


def ppo_rows(num, **more):
    return [
        {
            "training/global_step": step,
            "reward/mean": step / num,
            "objective/kl": step / num,
            "response_length/mean": 20.0,
            "timing_s/rollout": 1.0,
            "timing_s/train_actor": 2.0,
            "perf/time_per_step": 3.5,
            **more,
        }
        for step in range(1, num + 1)
    ]


def fixed_rows():
    return [
        {"step": s, "index": i, "prompt": f"prompt {i}", "completion": f"answer {i} at {s}", "fixed": True}
        for s in (0, 2, 3)
        for i in range(2)
    ]


def test_page_shows_config_curves_time_completions_and_environment(make_folder):
    config = "max_steps: 3\ndata: {batch_size: 6}\ngeneration: {num_generations: 2}\n"
    config += "ppo: {num_ppo_epochs: 1, num_mini_batches: 3}\nactor: {max_tokens_per_micro_batch: 512}\n"
    folder = make_folder(ppo_rows(3), fixed_rows(), config)
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "commit": None}))
    page = parsed(write_report([folder], folder / "report.html"))
    text = " ".join(page.texts)
    for part in ("PPO: run", "6 prompts × 2 generations = 12 sequences", "3 updates of 4 sequences", "2.13.0"):
        assert part in text
    for part in ("Before training", "Step 3", "answer 1 at 2", "train_actor", "other", "num_mini_batches"):
        assert part in text
    labels = [
        attrs.get("aria-label") for tag, attrs in page.elements if tag == "svg" and attrs.get("role") == "img"
    ]
    assert labels
    assert all(labels), "every chart has a text alternative"


def test_page_loads_nothing_and_runs_only_its_own_script(make_folder):
    folder = make_folder(ppo_rows(12))
    path = write_report([folder], folder / "report.html")
    page, text = parsed(path), path.read_text(encoding="utf-8")
    assert not [attrs for _, attrs in page.elements if {"src", "href", "srcset", "action"} & set(attrs)]
    assert not [
        attrs for _, attrs in page.elements if any(name.startswith("on") or name == "style" for name in attrs)
    ]
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_texts_of_a_run_cannot_become_markup(make_folder):
    samples = [
        {"step": s, "index": 0, "prompt": HOSTILE, "completion": HOSTILE, "fixed": f}
        for s in (0, 3)
        for f in (0, 1)
    ]
    config = (
        f"max_steps: 3\noutput_dir: {json.dumps(HOSTILE)}\nactor: {{model_name_or_path: {json.dumps('<b>x')}}}\n"
    )
    folder = make_folder(ppo_rows(3, **{HOSTILE: 1.0, f"reward/{HOSTILE}": 2.0}), samples, config)
    (folder / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    for runs in ([folder], [folder, make_folder(ppo_rows(3), samples, name="<i>other")]):
        page = parsed(write_report(runs, folder / "report.html"))
        tags = [tag for tag, _ in page.elements]
        assert tags.count("script") == 1
        assert not {"img", "b", "i>"} & set(tags)
        assert any("<script>alert(1)</script>" in text for text in page.texts), "shown as text"


def test_a_run_that_was_killed_or_is_still_going_can_be_read(make_folder):
    folder = make_folder(ppo_rows(2, **{"actor/grad_norm": None}))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"training/global_step": 3, "reward/me')
    with (folder / "samples.jsonl").open("ab") as file:
        file.write(b'{"step": 1, "completion": "\xff\xfe')
    run = read_run(folder)
    assert (run.num_steps, run.num_unreadable) == (2, 2)
    text = " ".join(parsed(write_report([folder], folder / "report.html")).texts)
    assert "step 2 of 3" in text
    assert "actor/grad_norm at steps 1 and 2" in text


LINES = ("", "[]", "3", "[" * 100000, '{"loss": {"a": 1}}', '{"training/global_step": "x", "loss": 1}')
LINES += ('{"loss": "high"}', '{"loss": NaN, "training/global_step": 1}', '{"training/global_step": -4}')
LINES += ('{"loss": 1' + "0" * 400 + "}",)


@pytest.mark.parametrize("line", LINES)
def test_whatever_a_line_holds_the_page_is_written(make_folder, line):
    folder = make_folder([])
    (folder / "metrics.jsonl").write_text(line + "\n")
    (folder / "samples.jsonl").write_text(
        line + "\n" + '{"step": null, "prompt": [{"role": "user"}], "reward": "x"}\n'
    )
    (folder / "config.yaml").write_text(": [")
    (folder / "environment.json").write_text(line)
    parsed(write_report([folder], folder / "report.html"))


def test_a_step_that_was_run_again_after_a_resume_counts_once(make_folder):
    rows = [{"training/global_step": s, "loss": v} for s, v in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    series = read_run(make_folder(rows)).series("loss")
    assert series.steps.tolist() == [1, 2, 3]
    assert series.values.tolist() == [3.0, 2.0, 1.0]


def test_comparison_lists_differing_keys_and_final_figures_and_overlays_curves(make_folder):
    first = make_folder(ppo_rows(12), fixed_rows(), "output_dir: a\nseed: 0\nppo: {kl_coef: 0.1}\n", name="a/ppo")
    rows = [row | {"only/here": 1.0 * i} for i, row in enumerate(ppo_rows(5))]
    second = make_folder(rows, fixed_rows(), "output_dir: b\nseed: 0\nppo: {kl_coef: 0.5}\n", name="b/ppo")
    page = parsed(write_report([first, second], first / "comparison.html"))
    text = " ".join(page.texts)
    assert "ppo.kl_coef" in text
    assert "seed" not in text
    assert "output_dir" not in text
    (reward,) = [
        json.loads(a["data-lines"])
        for tag, a in page.elements
        if tag == "figure"
        and "data-lines" in a
        and '"y":[0.08333' in a["data-lines"]
        and len(json.loads(a["data-lines"])) == 2
    ][:1]
    assert [line["n"] for line in reward] == ["a", "b"]
    assert [len(line["y"]) for line in reward] == [12, 5]
    assert text.count("answer 0 at 3") == 2


def test_comparison_says_once_what_the_sources_of_reward_have_in_common(make_folder):
    several = [row | {"reward/good": i / 3, "reward/short": 1 / (1 + i)} for i, row in enumerate(ppo_rows(12))]
    only = [row | {"reward/good": row["reward/mean"]} for row in ppo_rows(12)]
    for rows, count in ((several, 1), (only, 0)):
        folders = [make_folder(rows, name=f"{len(rows[0])}/{name}") for name in "ab"]
        page = parsed(write_report(folders, folders[0] / "comparison.html"))
        assert " ".join(page.texts).count("Reward by source") == count, "an only source is the mean reward itself"
        charts = [a["aria-label"] for tag, a in page.elements if tag == "svg" and a.get("role") == "img"]
        assert len([label for label in charts if "Reward by source" in label]) == 0
        assert any(label.startswith("short") for label in charts) == bool(count)


def test_what_is_no_source_of_reward_would_be_drawn_as_one(make_folder):
    more = {"reward/good": 1.0, "reward/short": 2.0, "reward/short/words": 5.0, "reward/short/num_errors": 1}
    more |= {"reward/group_std": 0.5, "reward/frac_reward_zero_std": 0.25, "reward/overlong_penalty": 0.1}
    rows = [row | {k: v * (i + 1) for k, v in more.items()} for i, row in enumerate(ppo_rows(12))]
    folder = make_folder(rows)
    (group,) = [group for group in charts_for(read_run(folder).metrics) if group.title == "Reward and KL"]
    by_title = {chart.title: [key for key, _ in chart.lines] for chart in group.charts}
    assert by_title["Reward by source"] == ["reward/good", "reward/short"]
    assert by_title["Groups of equal rewards"] == ["reward/frac_reward_zero_std"]
    assert "reward/group_std" in by_title["Spread of rewards"]


def test_what_methods_write_beside_sources_is_known_to_the_page_and_no_functions_name():
    """A new `reward/<name>` of a method needs a chart of its own, and a place among the names that are taken."""
    sources = Path(meshift.__file__).parent.glob("algorithms/*.py")
    written = {name for path in sources for name in re.findall(r'"reward/(\w+)"', path.read_text())}
    assert {"mean", "group_std", "frac_reward_zero_std", "over_greedy"} <= written
    assert written <= set(TAKEN)
    drawn = charts_for({f"reward/{name}" for name in written - {"reward_model"}})
    assert [chart for group in drawn for chart in group.charts if chart.title == "Reward by source"] == []


def test_a_comparison_would_list_defaults_of_roles_that_no_run_has(make_folder):
    ppo = load_config(PPORunConfig, None, [f"{k}=x" for k in RUN_KEYS])
    costly = load_config(PPORunConfig, None, [*(f"{k}=x" for k in RUN_KEYS), "cost.model_name_or_path=c"])
    grpo = load_config(GRPORunConfig, None, [*(f"{k}=x" for k in RUN_KEYS), "generation.num_generations=2"])
    names = ("ppo", "costly", "grpo")
    runs = [
        read_run(make_folder(ppo_rows(3), (), dump_config(config), name=name))
        for name, config in zip(names, (ppo, costly, grpo), strict=True)
    ]
    page = parsed(write_report([runs[0].path, runs[2].path], runs[0].path / "c.html"))
    text = "\n".join(page.texts)
    assert text.index("generation.num_generations") < text.index("keys that not all of the runs have")
    assert text.index("keys that not all of the runs have") < text.index("ppo.lam")
    told = [row[0] for row in differences([runs[0], runs[2]])]
    assert "ppo.lam" in told
    assert "critic.learning_rate" in told
    assert "generation.num_generations" in told
    assert not [key for key in told if "cost" in key or key.startswith(("reference.", "plan."))]
    assert "cost_critic.learning_rate" in [row[0] for row in differences([runs[0], runs[1]])]
    trunk = dict(runs[0].config["ppo"], shared_trunk=True)
    shared = replace(runs[0], config={**runs[0].config, "ppo": trunk})
    assert ["ppo.shared_trunk", "False", "True"] in differences([runs[0], shared])
    assert ["critic.learning_rate", "1e-05", "\N{EN DASH}"] in differences([runs[0], shared])


def test_fixed_completions_show_the_reward_that_their_rows_have(make_folder):
    rows = [row | {"reward": 0.25 + row["step"]} for row in fixed_rows()]
    rows[0]["reward"] = None
    folder = make_folder(ppo_rows(3), rows)
    text = " ".join(parsed(write_report([folder], folder / "report.html")).texts)
    assert [text.count(f"reward {value}") for value in ("0.25", "2.25", "3.25")] == [1, 2, 2]


def test_what_was_measured_once_stands_as_a_dot_beside_its_curve(make_folder):
    rows = [{"training/global_step": s, "accuracy": 0.5 + s / 30, "lr": 1.0 / s} for s in range(1, 13)]
    folder = make_folder([*rows[:-1], rows[-1] | {"eval/accuracy": 0.8}])
    page = parsed(write_report([folder], folder / "report.html"))
    (lines,) = [a["data-lines"] for _, a in page.elements if "held out" in a.get("data-lines", "")]
    assert [(line["x"], line["y"]) for line in json.loads(lines)][1] == ([12], [0.8])
    assert [a for tag, a in page.elements if tag == "circle"]
    courses = [a["class"] for tag, a in page.elements if tag == "path"]
    assert courses.count("raw c0") == 1, "a learning rate has no noise to smooth away"


def test_runs_are_named_by_what_tells_them_apart(make_folder):
    paths = [make_folder([], name=name) for name in ("x/ppo", "y/ppo", "y/z/ppo")]
    assert name_runs([read_run(path) for path in paths]) == ["x", "y", "z"]
    assert name_runs([read_run(paths[0]), read_run(paths[0])])[0] != name_runs([read_run(paths[0])] * 2)[1]


def test_a_long_run_stays_small_and_quick(make_folder):
    rng = np.random.default_rng(0)
    keys = [
        "reward/mean",
        "objective/kl",
        "actor/entropy",
        "perf/time_per_step",
        *(f"metric/{i}" for i in range(36)),
    ]
    keys += [f"timing_s/{name}" for name in ("rollout", "score", "train_actor")]
    rows = [
        {"training/global_step": s, **dict(zip(keys, rng.random(len(keys)), strict=True))} for s in range(1, 5001)
    ]
    samples = [
        {"step": s, "index": i, "prompt": "p" * 2000, "completion": "c" * 5000}
        for s in (1, 5000)
        for i in range(8)
    ]
    folder = make_folder(rows, samples + fixed_rows())
    began = time.process_time()
    path = write_report([folder], folder / "report.html")
    assert time.process_time() - began < 10
    assert path.stat().st_size < 2_000_000
    together = write_report([folder] * 6, folder / "comparison.html")
    assert together.stat().st_size < 2_000_000


def test_folder_of_no_run_and_file_that_cannot_be_written_are_named(make_folder, tmp_path):
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(InputError, match="no folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html")
    folder = make_folder(ppo_rows(3))
    with pytest.raises(ConfigError, match="cannot write the report"):
        write_report([folder], tmp_path / "nowhere" / "report.html")
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "report.html")


def test_a_report_that_cannot_be_finished_leaves_the_old_one(make_folder, monkeypatch):
    folder = make_folder(ppo_rows(3))
    path = write_report([folder], folder / "report.html")
    old = path.read_bytes()
    monkeypatch.setattr("meshift.report.write.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ConfigError, match="full"):
        write_report([folder], path)
    assert path.read_bytes() == old
    assert not list(folder.glob(".report*"))


def spread_rows():
    first = {"start_s/rollout": 0.0, "timing_s/rollout": 90.0, "start_s/values": 90.0, "timing_s/values": 9.0}
    later = {"start_s/rollout": 0.0, "timing_s/rollout": 4.0, "start_s/values": 4.0, "timing_s/values": 1.0}
    return [
        {"training/global_step": i + 1, "perf/time_per_step": 5.0, **(later if i else first)} for i in range(3)
    ]


def test_a_run_by_plan_would_not_show_its_devices(make_folder, tmp_path):
    folder = make_folder(spread_rows())
    (folder / "placements.json").write_text(json.dumps({"rollout": [0, 1], "values": [1], "unmeasured": [0]}))
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "A step on its devices" in page
    assert "rollout on 0, 1 from" in page
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="26" class="c(\d)">', page)
    assert len(bars) == 3
    wide, narrow = (float(bar[2]) for bar in (bars[0], bars[2]))
    assert wide == pytest.approx(4 * narrow, rel=0.01), "medians of all steps but the first"


@pytest.mark.parametrize("content", ["", "[]", '{"rollout": "0"}', '{"rollout": [true, -1]}', '{"x": [0]}'])
def test_placements_that_say_nothing_would_break_the_page(make_folder, tmp_path, content):
    folder = make_folder(spread_rows())
    (folder / "placements.json").write_text(content)
    write_report([folder], tmp_path / "report.html")
    assert "A step on its devices" not in (tmp_path / "report.html").read_text()
