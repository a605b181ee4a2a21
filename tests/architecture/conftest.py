"""The source as syntax trees, parsed once for all house rules."""

import pytest
from source_trees import Source, parse


@pytest.fixture(scope="session")
def meshift_sources() -> list[Source]:
    found = parse("meshift")
    assert len(found) > 20, "the tests look for the source in the wrong place"
    return found


@pytest.fixture(scope="session")
def all_sources(meshift_sources: list[Source]) -> list[Source]:
    """What a reader may meet: the package and what stands around it."""
    return [*meshift_sources, *parse("recipes"), *parse("examples"), *parse("benchmarks"), *parse("tests")]
