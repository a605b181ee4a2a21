"""The plain executor of plans, over numpy arrays in one process: the oracle of plans, and of real executors.

Every number has a value of its own, so that one that lands in a wrong place shows.
"""

from collections import defaultdict, deque

import numpy as np

from meshift.layout.boxes import boxes_of, shape_of

# numpy has no bfloat16: bits of that size do where nothing is calculated.
NUMPY = {"float64": "f8", "float32": "f4", "bfloat16": "u2", "float16": "f2", "uint8": "u1"}
RATE = 0.25


def whole_model(shards, dtype="float32", seed=0):
    """Name -> the whole parameter; random bits would include NaN, which equals nothing."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 60000, shard.shape).astype(NUMPY[dtype]) for name, shard in shards.items()}


def slices(box):
    return tuple(slice(*interval) for interval in box)


def place(whole, placement, shards):
    """Device -> name -> its shard, a contiguous array of its own."""
    return {
        device: {n: whole[n][slices(box)].copy() for n, box in boxes_of(placement.layout, shards, rank).items()}
        for rank, device in enumerate(placement.mesh.devices)
    }


class Executor:
    """Carries out a plan. Every device sees its own share only, and what arrives must be what it waits for.

    `held` is what the source's devices have. `target` is what the target's devices get, new memory unless given;
    `written` counts for each number there how often it was delivered.
    """

    def __init__(self, plan, shards, held, target=None):
        self.plan, self.held, self.target = plan, held, target or {}
        self.wire_bytes = self.num_aliases = 0
        self.written = {}
        for rank, device in enumerate(plan.target.mesh.devices):
            boxes = boxes_of(plan.target.layout, shards, rank)
            empty = {n: np.zeros(shape_of(box), NUMPY[plan.dtypes.target]) for n, box in boxes.items()}
            self.target.setdefault(device, empty)
            self.written[device] = {n: np.zeros(shape_of(box), int) for n, box in boxes.items()}

    def run(self, rounds=None):
        """All at once, or by `rounds` (device -> its rounds)."""
        devices = list({*self.plan.source.mesh.devices, *self.plan.target.mesh.devices})
        for device in devices:
            share = self.plan.share(device)
            for copy in share.copies:
                self.write(device, copy, self.held[device][copy.name][copy.source_slices])
            for alias in share.aliases:
                self.target[device][alias.name] = self.held[device][alias.name]
                self.written[device][alias.name] += 1
                self.num_aliases += 1
        rounds = rounds or {device: [self.plan.share(device)] for device in devices}
        for number in range(max(len(some) for some in rounds.values())):
            self.exchange({device: some[number] for device, some in rounds.items() if number < len(some)})
        return self.target

    def exchange(self, now):
        mail = defaultdict(deque)
        for device, part in now.items():
            for send in part.sends:
                data = self.held[device][send.name][send.source_slices].astype(NUMPY[self.plan.dtypes.wire])
                assert data.nbytes == send.num_bytes
                self.wire_bytes += data.nbytes
                mail[device, self.plan.target.device(send.target)].append((send, data))
        for device, part in now.items():
            for wanted in part.receives:
                sent, data = mail[self.plan.source.device(wanted.source), device].popleft()
                assert sent == wanted
                self.write(device, wanted, data)
        assert not any(mail.values()), "something was sent that nobody waited for"

    def write(self, device, transfer, data):
        into = self.target[device][transfer.name]
        view = into[transfer.target_slices]
        assert view.shape == transfer.shape == data.shape
        self.written[device][transfer.name][transfer.target_slices] += 1
        new = data.astype(into.dtype)
        view[...] = RATE * new + (1 - RATE) * view if self.plan.mix else new


def least_wire_bytes(source, target, shards, size, names):
    """By brute force: `size` for each number a target rank wants that its device does not have from the source."""
    total = 0
    for rank, device in enumerate(target.mesh.devices):
        twin = source.mesh.rank_of(device)
        have = {} if twin is None else boxes_of(source.layout, shards, twin)
        for name, box in boxes_of(target.layout, shards, rank).items():
            if name not in names:
                continue
            missing = np.zeros(shards[name].shape, bool)
            missing[slices(box)] = True
            if name in have:
                missing[slices(have[name])] = False
            total += int(missing.sum()) * size
    return total
