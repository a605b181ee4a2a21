"""One sandbox for the tests of a module: behind the best wall of this machine, with every layer."""

import pytest

from meshift.rewards.sandbox.pool import Sandbox
from meshift.rewards.sandbox.probes import probe

MEMORY = 128 * 2**20


@pytest.fixture(scope="session")
def protection():
    found = probe()
    found.require_all()
    return found


@pytest.fixture(scope="module")
def sandbox(protection):
    made = Sandbox(protection, 2 * MEMORY, 6)  # most of what hangs uses no processor
    yield made
    made.close()
