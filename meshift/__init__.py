"""Meshift: RLHF and RL training for language models. Start reading at `meshift/step.py`."""

__version__ = "0.1.0"
