"""All rules, asked of a run: warnings first, then notices, then what is well.

It knows no rule's inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from meshift.report import fit_rules, hacking, health_rules, rl_rules
from meshift.report.diagnosis import Diagnosis, Rule
from meshift.report.run_data import RunData

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "completeness": health_rules.completeness,
        "shortness": health_rules.shortness,
        "not_finite": health_rules.not_finite,
        "reward": rl_rules.reward,
        "hacking": hacking.hacking,
        "kl": rl_rules.kl,
        "entropy": rl_rules.entropy,
        "truncation": rl_rules.truncation,
        "value_function": rl_rules.value_function,
        "clipping": rl_rules.clipping,
        "early_stops": rl_rules.early_stops,
        "no_signal": rl_rules.no_signal,
        "loss": fit_rules.loss,
        "overfitting": fit_rules.overfitting,
        "chance": fit_rules.chance,
        "displacement": fit_rules.displacement,
        "spikes": health_rules.spikes,
        "drift": health_rules.drift,
    }
)
ORDER = ("warning", "notice", "good")


def diagnose(run: RunData) -> list[Diagnosis]:
    """What the rules have to say, the most severe first."""
    found = [diagnosis for rule in RULES.values() if (diagnosis := rule(run)) is not None]
    return sorted(found, key=lambda diagnosis: ORDER.index(diagnosis.severity))
