"""A device's part of a plan in rounds, so that what waits to be sent or stored stays under a bound.

Knows nothing of tensors or networks.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest

from meshift.errors import LayoutError
from meshift.layout.boxes import cut_box
from meshift.layout.mesh import Device
from meshift.realloc.transfers import Plan, Transfer


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one device sends and receives before it goes on; boxes are cut where they were too large."""

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]


def rounds_of(plan: Plan, device: Device, max_bytes: int) -> tuple[Round, ...]:
    """The device's transfers, in rounds of at most `max_bytes`, half of it sent and half received.

    A transfer is in the same round, in the same order and in the same pieces for both of its ends, though each
    looks at its own part of the plan only. For that, the transfers of a pair of ranks fill its rounds one after
    another up to `max_bytes / 2 / max(peers)`, where `peers` is how many ranks the sender sends to, and how many
    the receiver hears from. Raises `LayoutError` where that is less than one number.
    """
    share = plan.share(device)
    sends = _by_round(plan, share.sends, max_bytes)
    receives = _by_round(plan, share.receives, max_bytes)
    return tuple(Round(sends=s, receives=r) for s, r in zip_longest(sends, receives, fillvalue=()))


def _by_round(plan: Plan, transfers: Iterable[Transfer], max_bytes: int) -> list[tuple[Transfer, ...]]:
    pairs = defaultdict(list)
    for transfer in transfers:
        pairs[transfer.source, transfer.target].append(transfer)
    size, (sent_to, heard_from) = plan.dtypes.wire_size, plan.num_peers
    rounds: list[list[Transfer]] = []
    for (source, target), between in pairs.items():
        num_peers = max(sent_to[source], heard_from[target])
        most = max_bytes // 2 // num_peers // size
        if not most:
            raise LayoutError(
                f"{max_bytes} bytes are too few for a reallocation in which one rank has {num_peers} peers; "
                f"allow at least {2 * num_peers * size}."
            )
        for number, transfer in _fill(between, most, size):
            rounds += [[] for _ in range(number + 1 - len(rounds))]
            rounds[number].append(transfer)
    return [tuple(transfers) for transfers in rounds]


def _fill(transfers: Iterable[Transfer], most: int, size: int) -> Iterator[tuple[int, Transfer]]:
    """A pair's transfers in pieces, each with its round; a round has at most `most` numbers of `size` bytes."""
    number, room = 0, most
    for transfer in transfers:
        for box in cut_box(transfer.box, most):
            piece = transfer if box == transfer.box else transfer.part(box)
            if piece.num_bytes > room * size:
                number, room = number + 1, most
            room -= piece.num_bytes // size
            yield number, piece
