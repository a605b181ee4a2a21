"""What the ranks of a target placement want of a pattern's parameters, and who has it: itself, one or several.

Knows nothing of loads, bytes or rounds.
"""

from collections.abc import Mapping
from typing import NamedTuple

from meshift.layout.boxes import num_elements
from meshift.layout.layout import Placement
from meshift.realloc.overlaps import Overlap, Pattern
from meshift.realloc.sources import Candidates
from meshift.realloc.transfers import Route


class Wish(NamedTuple):
    """A rank wants the box of an overlap, of `num_elements` numbers, from any of the candidates."""

    candidates: Candidates
    target: int
    overlap: Overlap
    num_elements: int


class Wishes:
    """All that is wanted of one pattern: routes that are certain, and wishes that leave a choice of the sender."""

    def __init__(self, pattern: Pattern, meeting: "Meeting") -> None:
        self.names = pattern.names
        self.wire: list[Route] = []
        self.local: list[Route] = []
        self.open: list[Wish] = []
        senders = {held: meeting.by_host(holders) for held, holders in pattern.held.items()}
        for overlap in pattern.overlaps():
            others = self._keep_local(overlap, pattern, meeting)
            holders = pattern.held[overlap.held]
            if not others:
                continue
            if len(holders) == 1:
                self.wire.append(Route(holders[0], others, *overlap, 0, len(self.names)))
                continue
            by_host, volume = senders[overlap.held], num_elements(overlap.box)
            for target in others:
                candidates = by_host.get(meeting.hosts[target], holders)
                self.open.append(Wish(candidates, target, overlap, volume))

    def _keep_local(self, overlap: Overlap, pattern: Pattern, meeting: "Meeting") -> tuple[int, ...]:
        """Add the routes within a device. Returns the other ranks that want the overlap."""
        here = frozenset(pattern.held[overlap.held])
        others = []
        for target in pattern.wanted[overlap.wanted]:
            twin = meeting.twins[target]
            if twin is not None and twin in here:
                self.local.append(Route(twin, (target,), *overlap, 0, len(self.names)))
            else:
                others.append(target)
        return tuple(others)


class Meeting:
    """Where the ranks of two placements meet: on one device, or on one host.

    `twins` has for each target rank the source rank on its device (or None), `hosts` its host.
    """

    def __init__(self, source: Placement, target: Placement) -> None:
        self.twins = [source.mesh.rank_of(device) for device in target.mesh.devices]
        self.hosts = target.mesh.hosts
        self._source_hosts = source.mesh.hosts
        self._one_host = len({*self.hosts, *self._source_hosts}) == 1

    def by_host(self, holders: Candidates) -> Mapping[str, Candidates]:
        """Which of the holders are on each host that has any."""
        if self._one_host or len(holders) == 1:
            return {}
        found: dict[str, list[int]] = {}
        for rank in holders:
            found.setdefault(self._source_hosts[rank], []).append(rank)
        return {host: tuple(ranks) for host, ranks in found.items()}
