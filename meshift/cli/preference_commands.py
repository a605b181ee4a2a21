"""`meshift kto`, `orpo` and `simpo`: their words on the command line.

It knows nothing of how a run works.
"""

from __future__ import annotations

from meshift.cli.command import Command
from meshift.cli.train import Check, Run, Training, configure
from meshift.config.runs import KTORunConfig, ORPORunConfig, SimPORunConfig

WRITES = "Writes metrics.jsonl, TensorBoard curves and final/, a plain Hugging Face folder."


def _load_kto() -> tuple[Run, Check]:
    from meshift.runtime.kto_run import check_kto, run_kto

    return run_kto, check_kto


def _load_pairs() -> tuple[Run, Check]:
    from meshift.runtime.pair_run import check_pairs, run_pairs

    return run_pairs, check_pairs


KTO = Command(
    name="kto",
    summary="align a model on completions that were liked or not, without pairs",
    description=(
        "Align a model on rows of prompt, completion and label (true or false) by KTO: what was liked is to be\n"
        "likelier than a reference has it, and what was not less likely, measured from what is usual.\n" + WRITES
    ),
    example="meshift kto --config kto.yaml kto.beta=0.1 kto.undesirable_weight=1.33",
    configure=configure,
    run=Training(schema=KTORunConfig, load=_load_kto),
)
ORPO = Command(
    name="orpo",
    summary="align a model on preference pairs by ORPO: no reference, no SFT before it",
    description=(
        "Align a model on rows of prompt, chosen and rejected by ORPO: likelihood of the chosen text, and the\n"
        "odds ratio of both. There is no reference.\n" + WRITES
    ),
    example="meshift orpo --config orpo.yaml orpo.beta=0.1",
    configure=configure,
    run=Training(schema=ORPORunConfig, load=_load_pairs),
)
SIMPO = Command(
    name="simpo",
    summary="align a model on preference pairs by SimPO: mean log-probs, a margin, no reference",
    description=(
        "Align a model on rows of prompt, chosen and rejected by SimPO: the chosen text's mean log-prob per\n"
        "token is to be ahead by a margin. There is no reference.\n" + WRITES
    ),
    example="meshift simpo --config simpo.yaml simpo.beta=2 simpo.gamma=0.5",
    configure=configure,
    run=Training(schema=SimPORunConfig, load=_load_pairs),
)
PREFERENCE_COMMANDS = (KTO, ORPO, SIMPO)
