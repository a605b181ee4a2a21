"""Every key of every method stands in the docs with its default, and what the docs call a key is one."""

import re
from itertools import chain
from pathlib import Path

import pytest
import yaml

from meshift.config import policy_runs, runs
from meshift.config.loading import describe_keys
from meshift.config.section import Section

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"`([^`\n]+)`")
KEY = re.compile(r"([a-z_0-9]+(?:\[\])?(?:\.[a-z_0-9]+(?:\[\])?)*)(?:[:=].*)?")
PAGES = {  # method -> the page of its own sections, and those
    runs.PPORunConfig: ("ppo", ("ppo", "cost")),
    policy_runs.GRPORunConfig: ("grpo", ("grpo",)),
    policy_runs.DrGRPORunConfig: ("grpo", ("dr_grpo",)),
    policy_runs.DAPORunConfig: ("grpo", ("dapo",)),
    policy_runs.GSPORunConfig: ("grpo", ("gspo",)),
    policy_runs.CISPORunConfig: ("grpo", ("cispo",)),
    policy_runs.RLOORunConfig: ("reinforce", ("rloo",)),
    policy_runs.ReinforcePPRunConfig: ("reinforce", ("reinforce_pp",)),
    policy_runs.ReMaxRunConfig: ("reinforce", ("remax",)),
    policy_runs.OnlineDPORunConfig: ("online_dpo", ("online_dpo",)),
    policy_runs.RAFTRunConfig: ("online_dpo", ("raft",)),
    runs.DPORunConfig: ("dpo", ("dpo",)),
    runs.KTORunConfig: ("kto", ("kto",)),
    runs.ORPORunConfig: ("kto", ("orpo",)),
    runs.SimPORunConfig: ("kto", ("simpo",)),
    runs.RewardRunConfig: ("reward", ("reward",)),
    runs.SFTRunConfig: ("sft", ()),
}
SHARED = ("keys", "lora", "rewards")  # what more than one method has
ALSO = {"reinforce": ("grpo",)}  # pages that go on from another
METHOD_PAGES = sorted({page for page, _ in PAGES.values()})


def text_of(page):
    return (ROOT / ("README.md" if page == "README" else f"docs/{page}.md")).read_text(encoding="utf-8")


def keys_in(text):
    """What is written as code and could be a key, without a value: `loss_on: all` -> loss_on."""
    return {match[1] for code in CODE.findall(text) if (match := KEY.fullmatch(code))}


def named_in(page):
    return set().union(*(keys_in(text_of(one)) for one in (page, *ALSO.get(page, ()))))


def tables_of(page):
    """(keys, default cell) of the rows of all tables that have a column `key` and one `default`."""
    header = []
    for line in text_of(page).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = []
        elif not header:
            header = cells
        elif {"key", "default"} <= set(header) and set(cells) != {"---"}:
            yield [*CODE.findall(cells[header.index("key")])], cells[header.index("default")]


def defaults_by_key():
    """Dotted key -> every default that a method has for it, as text; keys of cost critics are those of critics."""
    found: dict[str, set[str]] = {}
    for schema in PAGES:
        for key, default, _ in describe_keys(schema):
            found.setdefault(key, set()).add(default)
    return found


def leaves(schema):
    below = [one for one in schema.__subclasses__() if one.__module__.startswith("meshift.config")]
    return {schema} if not below else set().union(*map(leaves, below))


def test_a_method_would_have_no_page():
    assert leaves(runs.RunConfig) == set(PAGES)


@pytest.mark.parametrize("schema", PAGES, ids=lambda schema: schema.__name__)
def test_a_key_of_a_methods_own_section_would_not_be_in_its_page(schema):
    page, sections = PAGES[schema]
    named = named_in(page)
    own = [key for key, _, _ in describe_keys(schema) if key.partition(".")[0] in sections and "[]" not in key]
    assert sections == () or own
    missing = [key for key in own if not {key, key.partition(".")[2]} & named]
    assert not missing


def test_a_key_of_ppo_would_not_be_in_the_readmes_table():
    text = text_of("README")
    listed = keys_in(text[text.index("## PPO options") :].partition("\n## ")[0])
    own = {key for key, _, _ in describe_keys(runs.PPORunConfig) if key.startswith("ppo.")}
    assert not {key for key in own if not {key, key.removeprefix("ppo.")} & listed}


def test_a_key_that_methods_share_would_be_in_no_page():
    named = set().union(*map(named_in, SHARED))
    missing = set()
    for schema, (_, own) in PAGES.items():
        for key, _, _ in describe_keys(schema):
            section = key.partition(".")[0]
            written = {key, key.partition(".")[2], key.rpartition(".")[2]}
            if section not in (*own, "plan") and not written & named:
                missing.add(key)
    assert not missing


@pytest.mark.parametrize("page", [*METHOD_PAGES, *SHARED, "asynchronous", "README"])
def test_a_page_would_name_a_key_that_is_none(page):
    known = defaults_by_key()
    sections = {key.partition(".")[0] for key in known if "." in key}
    files = (".py", ".md", ".yaml", ".json", ".jsonl", ".csv", ".html", ".safetensors")
    written = {key for key in keys_in(text_of(page)) if "." in key and not key.endswith(files)}
    prefixes = {key.rpartition(".")[0] for key in known}
    assert not {key for key in written if key.partition(".")[0] in sections} - set(known) - prefixes


def dotted(key, page, known):
    """The keys that a cell's word may stand for: itself, or one of a section of the page's methods."""
    sections = set(chain(*(own for one, own in PAGES.values() if page == one or one in ALSO)))
    sections |= {"data", "generation", "actor", "critic", "launch", "reference", "reward"}
    return [name for name in (key, *(f"{section}.{key}" for section in sorted(sections))) if name in known]


@pytest.mark.parametrize("page", [*METHOD_PAGES, "keys", "lora", "README"])
def test_a_table_would_give_a_default_that_is_another(page):
    known, compared = defaults_by_key(), 0
    for written, cell in tables_of(page):
        keys = [key for key in written if not key.endswith("*")]
        shown = [part.strip() for part in re.sub(r" ?\([^)]*\)", "", cell.partition(";")[0]).split(",")]
        shown = shown if len(shown) == len(keys) else [cell] * len(keys)
        last = ""
        for key, text in zip(keys, shown, strict=True):
            section = last if "." not in key and last else ""
            last = key.rpartition(".")[0] or last
            names = [f"{section}.{key}"] if f"{section}.{key}" in known else dotted(key, page, known)
            assert names, f"`{key}` is no key"
            if text and not key.startswith("lora."):
                defaults = set().union(*(known[name] for name in names))
                assert is_one_of(text, defaults), f"`{key}`: {text!r} is none of {defaults}"
                compared += 1
    assert compared or page == "lora"


def is_one_of(text, defaults):
    """Words ("none", "the actor") stand for null and for what must be given."""
    value = plain(text.strip("`"))
    given = {str(plain(default)) for default in defaults}
    return str(value) in given or (isinstance(value, str | type(None)) and bool({"None", "required"} & given))


def plain(text):
    value = yaml.safe_load(text) if text not in ("", "*") else text
    try:
        return float(value) if not isinstance(value, bool) else value
    except (TypeError, ValueError):
        return value


def test_nothing_would_read_a_key():
    """Sections know of their keys without reading them; what runs make of them is in the configs of these."""
    sources = [path for path in (ROOT / "meshift").rglob("*.py") if not path.name.endswith("sections.py")]
    read = set(re.findall(r"\.([a-z_][a-z_0-9]*)", "\n".join(path.read_text("utf-8") for path in sources)))
    keys = {key.rpartition(".")[2] for schema in PAGES for key, _, _ in describe_keys(schema)}
    assert len(keys) > 100
    assert not keys - read


OTHERS = {  # a value that is not the default, for each key that another switches off
    "adaptive_kl": True,
    "importance_cap": 3.0,
    "kl_horizon": 10,
    "kl_target": 3.0,
    "kl_target_unit": "token",
    "max_sampling_rounds": 2,
    "min_lr_ratio": 0.5,
    "overlong_penalty": 0.5,
    "ref_model_mixup_alpha": 0.5,
    "ref_model_sync_steps": 2,
    "value_norm_beta": 0.9,
    "vf_coef": 0.5,
    "weight": 2.0,
}


def sections_below(kind):
    ours = {one for one in kind.__subclasses__() if one.__module__.startswith("meshift.config")}
    return ours.union(*map(sections_below, ours))


IDLE = [
    pytest.param(kind, key, off, id=f"{kind.__name__}-{key}")
    for kind in sorted(sections_below(Section), key=lambda kind: kind.__name__)
    for key, off in kind.IDLE.items()
]


@pytest.mark.parametrize(("kind", "key", "off"), IDLE)
def test_a_key_that_does_nothing_would_be_taken(kind, key, off):
    default = kind.model_fields[key].default
    assert OTHERS[key] != default
    for value in off.values:
        with pytest.raises(ValueError, match=f"{key} is .* does nothing while {off.key} is .* set {key} back"):
            kind(**{off.key: value, key: OTHERS[key]})
        assert getattr(kind(**{off.key: value, key: default}), key) == default
    told = {tuple(keys_in(line)) for line in text_of("keys").splitlines() if line.startswith("|")}
    assert any({key, off.key} <= {name.rpartition(".")[2] for name in names} for names in told)
