"""The errors a user can cause. One sentence each: what was wrong, where, and what to do.

The command line turns a `MeshiftError` into its sentence and its exit code, never into a traceback.
"""

MOST_SHOWN = 80
"""Characters of a wrong value that a sentence repeats."""


def shown(value: object) -> str:
    """A wrong value as a sentence shows it: its beginning, where it is long."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


class MeshiftError(Exception):
    """The run failed in a way that has a plain explanation. Exit code 1."""

    exit_code = 1


class InputError(MeshiftError):
    """What the user gave (a key, a file, a row, a folder) is wrong. Exit code 2."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value is wrong; the message names the key."""


class DataError(InputError):
    """A data file or row is wrong; the message names the file and the line."""


class ModelError(InputError):
    """A model folder is missing, incomplete or of an unsupported architecture."""


class LayoutError(InputError):
    """A mesh or a layout is badly written, does not fit the devices, or cannot cut this model."""


class SaveError(MeshiftError):
    """A model could not be written, though the run was right: the disk is full, or the folder has gone."""


class CheckpointError(InputError):
    """A checkpoint is torn, was changed since it was written, or belongs to another run."""


class OtherFormatError(CheckpointError):
    """A checkpoint is whole, but another version of Meshift wrote it in a form that this one cannot read."""


class StoppedRunError(MeshiftError):
    """The machine asked the run to end (SIGTERM), and it did. The exit code is a shell's for SIGTERM."""

    exit_code = 143


class RewardError(MeshiftError):
    """A reward function raised, or returned something that is no list of numbers."""


class WorkerError(MeshiftError):
    """A process of a run failed or died, and the others were ended."""


class LostWorkerError(WorkerError):
    """A process of a run was killed, or hangs. `report` says of a hang where each process was, with its stack."""

    def __init__(self, text: str, *, report: str | None = None) -> None:
        super().__init__(text)
        self.report = report


class StaleWeightsError(MeshiftError):
    """Two parties to one step hold different versions of the same weights."""


class ReallocationError(MeshiftError):
    """Parameters that moved are not what was sent, or processes disagree about what moves where."""


class NonFiniteError(MeshiftError):
    """A loss, a gradient, a log-probability or a model's score is NaN or infinite."""
