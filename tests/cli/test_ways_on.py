"""A run that failed says where it can be gone on with."""

import pytest

from meshift.cli.command import add_way_on
from meshift.errors import CheckpointError, NonFiniteError, SaveError


@pytest.mark.parametrize(
    ("error", "checkpoint", "expected"),
    [
        (NonFiniteError("the loss is nan"), True, "the loss is nan; --resume goes on from {run}/checkpoint-4"),
        (NonFiniteError("the loss is nan"), False, "the loss is nan"),
        (SaveError("the disk is full; go on with --resume"), True, "the disk is full; go on with --resume"),
        (CheckpointError("it is torn"), True, "it is torn"),
    ],
)
def test_a_failure_names_the_checkpoint_that_is_left(tmp_path, error, checkpoint, expected):
    if checkpoint:
        (tmp_path / "LATEST").write_text("checkpoint-4\n")
    add_way_on(error, str(tmp_path))
    assert str(error) == expected.format(run=tmp_path)
