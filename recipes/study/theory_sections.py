"""The report's sections on the counter-example and on the 8 x 8 scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshift.report.document import number_table, section
from meshift.report.heat_table import heat_table
from meshift.report.interval_chart import Mark, Span, Track, interval_chart
from meshift.report.line_chart import Caption
from meshift.report.markup import Markup, element
from meshift.report.numbers import short
from recipes.study.findings import cell_of, figures, in_words
from recipes.study.intervals import Mean, mean_of
from recipes.study.setting import TheorySetting

NAMES = {"reference": "reference", "dpo": "DPO", "ppo": "PPO", "optimum": "PPO's optimum"}
SLOTS = {"dpo": 1, "ppo": 0, "optimum": 2}
COLUMNS = (
    ("largest_rise", "largest rise of an uncovered response"),
    ("raised", "uncovered responses raised by more than .01"),
    ("mass", "probability of all uncovered responses"),
    ("right", "probability of the right response"),
)


def actions_section(actions: Mapping[str, Any]) -> Markup:
    """Losses, optima, and where training ends."""
    losses = [[policy_words(row["policy"]), short(row["loss"])] for row in actions["dpo_losses"]]
    ppo = [
        [policy_words(row["reward"], 1), policy_words(row["optimum"]), policy_words(row["trained"])]
        for row in actions["ppo"]
    ]
    starts = [
        [policy_words(row["start"]), policy_words(row["dpo"]), policy_words(row["ppo"])]
        for row in actions["starts"]
    ]
    return section(
        "Three actions, one preference",
        element(
            "p",
            "The reference is (.5, .5, 0); the first action was preferred to the second; nobody saw the third. "
            f"Computed with Meshift's own DPO, reward model and PPO losses, beta {actions['beta']:g}.",
            class_="hint",
        ),
        number_table(["policy", "DPO's loss"], losses),
        element(
            "h3", "PPO with the learned reward, where the score of the third action began elsewhere each time"
        ),
        number_table(["learned reward", "optimum of the objective", "PPO from the reference"], ppo),
        element("h3", "Where training ends that begins off the reference"),
        number_table(["start", "DPO", "PPO"], starts),
        anchor="three-actions",
    )


def policy_words(numbers: Sequence[float], decimals: int = 3) -> str:
    """`(0.100, 0.000, 0.900)`."""
    return "(" + ", ".join(f"{number:.{decimals}f}" for number in numbers) + ")"


def grid_section(theory: Mapping[str, Any], setting: TheorySetting) -> Markup:
    """The tables of one seed, the curves over training, and all numbers of pairs and betas."""
    cell = cell_of(theory, setting.shown)
    grid = cell["setting"]
    seeds = len(cell["seeds"])
    words = (
        f"Prompts are one-hot, policy, critic and reward model MLPs of two hidden layers of {grid['hidden']}; the "
        "right response to prompt i is i. For each prompt it beats some of the 7 others, drawn at random; what is "
        f"in no pair is uncovered. The reference is the freshly drawn policy. Adam at {grid['learning_rate']:g}: "
        f"{grid['dpo_steps']} whole-batch steps of DPO, {grid['reward_steps']} of the reward model, "
        f"{grid['ppo_steps']} PPO steps of 512 rollouts in 4 mini-batches, gamma = lambda = 1. Means over {seeds} "
        "seeds with 95 % intervals. The paper gives no sizes, rates, steps or numbers of pairs; those vary."
    )
    return section(
        "8 prompts, 8 responses",
        element("p", words, class_="hint"),
        element("div", *[_rises(theory, beta) for beta in setting.betas], class_="halves"),
        element("h3", f"{grid['pairs_per_prompt']} pairs a prompt, beta {grid['beta']:g}: over training"),
        element("div", _curve(cell, *COLUMNS[0]), _curve(cell, *COLUMNS[3]), class_="halves"),
        element("h3", "Seed 0 of these, as in the paper's figure 1"),
        _heats(cell),
        element("h3", "All of them, after training"),
        number_table(["pairs a prompt, beta, policy", *(title for _, title in COLUMNS)], _rows(theory)),
        anchor="grid",
    )


def span(found: Mean) -> Span:
    """A mean as a chart takes it."""
    return Span(value=found.value, low=found.low, high=found.high)


def _rises(theory: Mapping[str, Any], beta: float) -> Markup:
    cells = [cell for cell in theory["cells"] if cell["setting"]["beta"] == beta]
    tracks = [
        Track(
            label=NAMES[method],
            slot=slot,
            marks=[
                Mark(
                    x=Span.exactly(cell["setting"]["pairs_per_prompt"]),
                    y=span(mean_of(figures(cell, method, "largest_rise"))),
                )
                for cell in cells
            ],
        )
        for method, slot in SLOTS.items()
    ]
    caption = Caption(
        title=f"Uncovered responses, beta {beta:g}", key="largest rise of a prompt's, mean over prompts"
    )
    return interval_chart(caption, tracks, "pairs a prompt")


def _curve(cell: Mapping[str, Any], figure: str, title: str) -> Markup:
    tracks = []
    for method in ("dpo", "ppo"):
        points = zip(*(curves[method] for curves in cell["curves"]), strict=True)
        marks = [
            Mark(x=Span.exactly(at[0]["done"]), y=span(mean_of([point[figure] for point in at]))) for at in points
        ]
        tracks.append(Track(label=NAMES[method], slot=SLOTS[method], marks=marks))
    return interval_chart(
        Caption(title=title.capitalize(), key=title), tracks, "part of the training that is done"
    )


def _heats(cell: Mapping[str, Any]) -> Markup:
    first, marked = cell["first"], [tuple(cell["seeds"][0]["marked"]["cell"])]
    scores = [number for row in first["scores"] for number in row]
    tables = [heat_table("in a pair", first["covered"], low=0, high=1, decimals=0)]
    for name in ("reference", "dpo"):
        tables.append(heat_table(NAMES[name], first["tables"][name], low=0, high=1, ringed=marked))
    tables.append(
        heat_table("reward model", first["scores"], low=min(scores), high=max(scores), ringed=marked, decimals=1)
    )
    tables.append(heat_table("PPO", first["tables"]["ppo"], low=0, high=1, ringed=marked))
    note = "Rows are prompts, columns responses. Ringed: the uncovered response that DPO raised most."
    return element("div", element("div", *tables, class_="heats"), element("p", note, class_="hint"))


def _rows(theory: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for cell in theory["cells"]:
        grid = cell["setting"]
        for method in SLOTS:
            label = f"{grid['pairs_per_prompt']}, {grid['beta']:g}, {NAMES[method]}"
            rows.append([label, *(in_words(mean_of(figures(cell, method, key))) for key, _ in COLUMNS)])
    return rows
