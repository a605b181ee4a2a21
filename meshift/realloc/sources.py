"""Which of several ranks that hold the same numbers sends them: loads are spread, by greedy choice and refinement.

Plain integers; it knows nothing of parameters, layouts or devices.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapreplace
from itertools import accumulate

Candidates = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The sender of each parcel; and a load that the busiest rank has under any choice (`least_peak`)."""

    senders: Sequence[int]
    least_peak: int


def choose_senders(sizes: Sequence[int], candidates: Sequence[Candidates], fixed: Sequence[int]) -> Choice:
    """Senders such that the largest load of a rank is small; a load is the sum of the sizes that a rank sends.

    `sizes[i]` is parcel i's size and `candidates[i]` the ranks that may send it; `fixed` is what each rank sends
    anyway. Each parcel, the largest first, goes to the candidate with the least load (Graham's LPT rule, 1969);
    then single parcels move away from the busiest rank while that lowers its load.
    """
    loads, senders = list(fixed), [-1] * len(sizes)
    # By identity: many parcels share one tuple of candidates, and to hash a long one costs.
    queues: dict[int, list[tuple[int, int]]] = {}
    for parcel in sorted(range(len(sizes)), key=lambda parcel: -sizes[parcel]):
        ranks = candidates[parcel]
        if id(ranks) not in queues:
            queues[id(ranks)] = sorted((loads[rank], rank) for rank in ranks)
        rank = _least_loaded(queues[id(ranks)], loads)
        senders[parcel] = rank
        loads[rank] += sizes[parcel]
    _refine(sizes, candidates, senders, loads)
    return Choice(senders=senders, least_peak=_least_peak(sizes, candidates, fixed, loads))


def _least_loaded(queue: list[tuple[int, int]], loads: Sequence[int]) -> int:
    """The candidate with the least load. Loads only grow, so the heap is put right where it is asked."""
    while queue[0][0] != loads[queue[0][1]]:
        rank = queue[0][1]
        heapreplace(queue, (loads[rank], rank))
    return queue[0][1]


def _refine(sizes: Sequence[int], candidates: Sequence[Candidates], senders: list[int], loads: list[int]) -> None:
    """Move parcels from the busiest rank to others; changes `senders` and `loads`."""
    held: dict[int, list[int]] = defaultdict(list)
    for parcel, sender in enumerate(senders):
        held[sender].append(parcel)
    for _ in range(2 * len(loads)):  # each move is one step down; the bound keeps hopeless cases short
        busiest = max(range(len(loads)), key=loads.__getitem__)
        least: dict[int, int] = {}
        for parcel in held[busiest]:
            ranks, size = candidates[parcel], sizes[parcel]
            if id(ranks) not in least:
                least[id(ranks)] = min(ranks, key=loads.__getitem__)
            receiver = least[id(ranks)]
            if loads[receiver] + size < loads[busiest]:
                break
        else:
            return
        held[busiest].remove(parcel)
        held[receiver].append(parcel)
        senders[parcel] = receiver
        loads[busiest] -= size
        loads[receiver] += size


def _least_peak(
    sizes: Sequence[int], candidates: Sequence[Candidates], fixed: Sequence[int], loads: Sequence[int]
) -> int:
    """A bound from below on the busiest rank's load, whatever is chosen.

    What only the ranks of a set may send, they must send: the mean of it over the set is a bound. Taken is the
    best over the k busiest ranks, for every k; where loads are spread as well as they can be, it is met.
    """
    order = sorted(range(len(loads)), key=lambda rank: -loads[rank])
    place = {rank: k for k, rank in enumerate(order)}
    last: dict[int, int] = {}
    closed = [fixed[rank] for rank in order]  # by place: what no rank after it may send
    for size, ranks in zip(sizes, candidates, strict=True):
        if id(ranks) not in last:
            last[id(ranks)] = max(place[rank] for rank in ranks)
        closed[last[id(ranks)]] += size
    return max((-(-total // k) for k, total in enumerate(accumulate(closed), 1)), default=0)
