"""Plans of reallocation: which rank sends which box of which parameter to whom, with the fewest bytes on the wire.

A pure function of two placements and the shard table. It knows nothing of tensors, processes or networks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from meshift.layout.boxes import cut_box, num_elements
from meshift.layout.layout import Placement
from meshift.layout.shard import Shard
from meshift.realloc.dtypes import Dtypes
from meshift.realloc.overlaps import Overlap, find_patterns
from meshift.realloc.sources import Candidates, choose_senders
from meshift.realloc.transfers import Moves, Plan, Route
from meshift.realloc.wishes import Meeting, Wishes

FINEST = 1 << 20
"""Bytes: a box is not cut smaller than this only to spread the load of its senders."""

PARCELS_PER_SENDER = 32
"""What several ranks could send is divided so that each sends about this many parcels."""

BFLOAT16 = Dtypes()


def plan(
    source: Placement,
    target: Placement,
    shards: Mapping[str, Shard],
    *,
    dtypes: Dtypes = BFLOAT16,
    mix: bool = False,
    leave_out: Collection[str] = (),
    finest: int = FINEST,
) -> Plan:
    """The transfers that give every rank of `target` its boxes, from what the ranks of `source` hold.

    Each number that a target rank wants and its device does not hold is sent to it exactly once; hence the bytes
    on the wire are the least that is possible without forwarding. Ranks that hold the same box share the sending
    of it: those on the receiver's host if there are any, and among them whoever has least to send. The result
    depends on the arguments alone, so ranks can each make it for themselves (`Plan.digest`).

    `leave_out` names parameters that the target has already (`unchanged`). `mix` says that the target will be
    mixed, not replaced. Raises `LayoutError` where a layout cannot cut the model, `KeyError` where `leave_out`
    names none of its parameters.
    """
    if unknown := sorted(set(leave_out) - set(shards)):
        raise KeyError(f"There is no parameter {unknown[0]}.")
    names = [name for name in shards if name not in leave_out]
    patterns = find_patterns(source.layout, target.layout, shards, names)
    meeting = Meeting(source, target)
    wishes = [Wishes(pattern, meeting) for pattern in patterns]
    size = dtypes.wire_size
    least_peak = size * _grant(wishes, source.layout.num_ranks, finest // size)
    moves = tuple(Moves(names=w.names, wire=tuple(w.wire), local=tuple(w.local)) for w in wishes)
    return Plan(source=source, target=target, dtypes=dtypes, mix=mix, moves=moves, least_peak=least_peak)


def unchanged(held: Mapping[str, int], wanted: Mapping[str, int]) -> frozenset[str]:
    """The parameters to leave out: those of which the target (`held`) has the source's version (`wanted`) already.

    A frozen parameter keeps its version, so it is sent once.
    """
    return frozenset(name for name, version in wanted.items() if held.get(name) == version)


class Plans:
    """The plans of one model, each made once: a run moves the same parameters between the same placements."""

    def __init__(self, shards: Mapping[str, Shard]) -> None:
        self._shards = dict(shards)
        self._made: dict[tuple[Placement, Placement, Dtypes, bool, frozenset[str]], Plan] = {}

    def between(
        self,
        source: Placement,
        target: Placement,
        *,
        dtypes: Dtypes = BFLOAT16,
        mix: bool = False,
        leave_out: Collection[str] = (),
    ) -> Plan:
        """What `plan` returns, from memory if it was asked for before."""
        key = source, target, dtypes, mix, frozenset(leave_out)
        if key not in self._made:
            self._made[key] = plan(source, target, self._shards, dtypes=dtypes, mix=mix, leave_out=leave_out)
        return self._made[key]


class _Parcel(NamedTuple):
    """What one sender, still to be chosen, sends to one rank: a box of `names[first:stop]`, `size` numbers."""

    candidates: Candidates
    target: int
    overlap: Overlap
    first: int
    stop: int
    size: int


def _grant(all_wishes: Sequence[Wishes], num_ranks: int, finest: int) -> int:
    """Choose who sends what is open, and add these routes. Returns what the busiest rank must send at least.

    All in numbers, not bytes.
    """
    fixed = [0] * num_ranks
    for route in (route for wishes in all_wishes for route in wishes.wire):
        fixed[route.source] += route.num_elements
    most = max(1, _fair_load(all_wishes) // PARCELS_PER_SENDER)
    parcels = [list(_parcels(wishes, most, finest)) for wishes in all_wishes]
    flat = [parcel for some in parcels for parcel in some]
    choice = choose_senders([parcel.size for parcel in flat], [parcel.candidates for parcel in flat], fixed)
    senders = iter(choice.senders)
    for wishes, some in zip(all_wishes, parcels, strict=True):
        wishes.wire += [Route(next(senders), (p.target,), *p.overlap, p.first, p.stop) for p in some]
    return choice.least_peak


def _fair_load(all_wishes: Sequence[Wishes]) -> int:
    """What each rank that could send would send of the open wishes, if all sent the same."""
    able: dict[int, Candidates] = {}
    total = 0
    for wishes in all_wishes:
        able |= {id(wish.candidates): wish.candidates for wish in wishes.open}
        total += len(wishes.names) * sum(wish.num_elements for wish in wishes.open)
    return total // max(1, len({rank for candidates in able.values() for rank in candidates}))


def _parcels(wishes: Wishes, most: int, finest: int) -> Iterator[_Parcel]:
    """The open wishes, in parcels of about `most` numbers: divided by parameters, large boxes also by rows."""
    num_names = len(wishes.names)
    for candidates, target, overlap, volume in wishes.open:
        num_parcels = -(-volume * num_names // most)
        num_ranges = min(num_names, num_parcels)
        for part in _cut(overlap, max(most, finest)) if num_parcels > num_names else [overlap]:
            size = volume if part is overlap else num_elements(part.box)
            for i in range(num_ranges):
                first, stop = i * num_names // num_ranges, (i + 1) * num_names // num_ranges
                yield _Parcel(candidates, target, part, first, stop, size * (stop - first))


def _cut(overlap: Overlap, most: int) -> list[Overlap]:
    return [Overlap(overlap.held, overlap.wanted, box) for box in cut_box(overlap.box, most)]
