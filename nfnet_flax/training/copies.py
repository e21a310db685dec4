"""Checks that all processes have the same state, before a checkpoint is written and after the first step.

What is not divided over processes, such as biases and gains, each process updates in its own copy. The copies are equal
as long as all processes compute the same. If the processors of two hosts round differently, or a bit in memory flips,
the copies differ without an error. As a checkpoint takes each part of an array from one process, a mixture of copies
would then be saved, which no process ever had.
"""

import hashlib
import itertools
import json

from nfnet_flax.parallel.processes import Processes
from nfnet_flax.training.fingerprints import CopiesDiffer, Fingerprints

_TIMEOUT_S = 3600.0
"""Longest time that processes wait for one that still computes."""
_NUM_NAMED = 3
_names = (f"copies/{number}" for number in itertools.count())


def check_copies(processes: Processes, arrays: Fingerprints, step: int) -> None:
    """Compares the fingerprints of all processes; to be called by all of them at the same step.

    If there is no difference, each process sends only a few bytes through the coordination service.

    Args:
      processes: the processes of this run.
      arrays: fingerprints of this process's copy of the state.
      step: step of the state, for the message.

    Raises:
      CopiesDiffer: the copies differ; raised in all processes. The message names processes and arrays.
    """
    if processes.count > 1:
        compare_copies(processes, next(_names), arrays, step)


def compare_copies(processes: Processes, name: str, arrays: Fingerprints, step: int) -> None:
    """Like `check_copies`, for several processes; each `name` can be used once."""
    digest = hashlib.blake2b(json.dumps(arrays, sort_keys=True).encode(), digest_size=16).hexdigest()
    processes.put(f"{name}/{processes.index}", digest)
    processes.barrier(name, _TIMEOUT_S)
    digests = processes.of_all(name)
    if len(set(digests.values())) == 1:
        return
    processes.put(f"{name}_arrays/{processes.index}", arrays)
    processes.barrier(f"{name}_arrays", _TIMEOUT_S)
    raise CopiesDiffer(_difference(digests, processes.of_all(f"{name}_arrays"), step))


def _difference(digests: dict[int, str], arrays: dict[int, Fingerprints], step: int) -> str:
    holders = {digest: [index for index in digests if digests[index] == digest] for digest in digests.values()}
    *others, common = sorted(holders.values(), key=len)
    one, other = others[0][0], common[0]
    names = [name for name in arrays[other] if arrays[one].get(name) != arrays[other][name]]
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    which = "; ".join(
        f"process{'es' if len(group) > 1 else ''} {', '.join(map(str, group))}" for group in holders.values()
    )
    return (
        f"the processes of this run hold different states at step {step} ({which}): "
        f"{', '.join(names[:_NUM_NAMED])}{more} differ between process {one} and process {other}. Hosts whose "
        "processors or libraries round differently cause this, and so does a host with faulty memory. Nothing of this "
        "step was saved and earlier checkpoints are good: run again on hosts of one kind, or without the faulty host"
    )
