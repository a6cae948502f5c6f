"""Which rows go where: duplicates, splits, leaks. Pure functions of keys, in numpy.

    keys, roles, clusters ──equal ids──equal sequences──draw units──equal across splits──> split and reason of each row

Knows nothing of files and letters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moltron.config.schema import PrepareConfig
from moltron.data.prepare.clusters import Assignment, Mapping
from moltron.data.prepare.keys import draw, first_of_equals
from moltron.data.prepare.spool import Spool

NAMES = ("train", "val", "test")
TRAIN, VAL, TEST, MEMBER = range(4)  # roles: `input`, `val_input`, `test_input`, `members`
NOWHERE = -1
KEPT, SAME_ID, EQUAL, LEAK, UNMAPPED, EMPTY, UNUSED = range(7)
REASONS = {
    SAME_ID: "the id was used by an earlier record",
    EQUAL: "sequence equal to an earlier one",
    LEAK: "sequence equal to one in val or test",
    UNMAPPED: "not in the mapping",
    EMPTY: "none of its members is in the members file",
}


@dataclass
class Decision:
    split: np.ndarray  # (N,) int8: TRAIN, VAL, TEST or NOWHERE
    reason: np.ndarray  # (N,) uint8: KEPT, UNUSED (by rule: counted, no reject) or one of REASONS
    cluster: np.ndarray | None  # (N,) int64: equal numbers, same cluster


def decide(spool: Spool, config: PrepareConfig, table: Assignment | None, mapping: Mapping | None) -> Decision:
    """One place for all rules; each step sees only what the ones before it kept.

    1. An id names one record of an input: later ones are rejected.
    2. Equal sequences of one input (with a mapping: of one cluster; with a column `split`: of one split): all but the
       first are dropped, if so configured.
    3. val and test are drawn by a hash of (seed, id): whole clusters where there are any, else distinct sequences; with
       a mapping val and test get the drawn clusters' UniRef50 sequence and train the other clusters' members.
    4. A sequence that is in test leaves val and train, one that is in val leaves train.
    """
    role, rows = spool.role, np.arange(len(spool))
    own, member = role == TRAIN, role == MEMBER
    reason = np.zeros(len(spool), dtype=np.uint8)
    # 1. ids
    reason[first_of_equals(_within(spool.id_keys, role)) != rows] = SAME_ID
    # 2. equal sequences
    scope = role
    if mapping is not None:
        reason[member & (mapping.owner < 0) & (reason == KEPT)] = UNUSED
        reason[own & ~mapping.mapped & (reason == KEPT)] = UNMAPPED
        # each UniRef50 record is a scope of its own: it stands for its cluster, whatever its sequence
        scope = np.where(member, len(rows) + mapping.owner, np.where(own, rows, -1 - scope.astype(np.int64)))
    elif table is not None and table.split is not None:
        scope = scope + 4 * table.split  # as with files: of equal ones train gives way, not the first
    alive = np.flatnonzero(reason == KEPT)
    leader = rows.copy()  # the first row with an equal sequence
    leader[alive] = alive[first_of_equals(_within(spool.sequence_keys[alive], scope[alive]))]
    if config.duplicates == "drop":
        reason[leader != rows] = EQUAL
    del alive, scope
    # 3. draws, from `unit`: the row that stands for each row's cluster or copies
    split = role.astype(np.int8)
    own, member = np.flatnonzero(own & (reason == KEPT)), np.flatnonzero(member & (reason == KEPT))
    unit, keys, what = leader, spool.id_keys, "distinct sequences"
    if mapping is not None:
        unit, what = np.where(role == MEMBER, mapping.owner, rows), "clusters"
        filled = np.isin(own, unit[member])
        reason[own[~filled]] = EMPTY
        own = own[filled]
    elif table is not None:
        keys, what = table.keys, "clusters"
        unit[own] = own[first_of_equals(keys[own])]
    if table is not None and table.split is not None:
        split[own] = table.split[own]
    else:
        fate = _draw(keys, np.unique(unit[own]), config, what)
        split[own] = fate[unit[own]]
        if mapping is not None:  # the text to train on is the members', to validate on the UniRef50 records'
            split[member] = TRAIN
            reason[own[split[own] == TRAIN]] = reason[member[fate[unit[member]] != TRAIN]] = UNUSED
    # 4. equal across splits
    kept = np.flatnonzero(reason == KEPT)
    leader = first_of_equals(spool.sequence_keys[kept])
    highest = split[kept]
    np.maximum.at(highest, leader, split[kept])
    reason[kept[split[kept] < highest[leader]]] = LEAK
    split[reason != KEPT] = NOWHERE
    return Decision(split, reason, unit if what == "clusters" else None)


def _within(keys: np.ndarray, scope: np.ndarray) -> np.ndarray:
    """Keys that are equal only within a scope."""
    mixed = scope.astype(np.uint64)  # then in place: there may be many
    mixed *= np.uint64(0x9E3779B97F4A7C15)
    mixed ^= keys
    return mixed


def _draw(keys: np.ndarray, units: np.ndarray, config: PrepareConfig, what: str) -> np.ndarray:
    """-> (N,) int8: where the rows in `units` go; TRAIN for all others."""
    asked = {"val_size": config.val_size, "test_size": config.test_size}
    sizes = [round(size) if size >= 1 else round(size * len(units)) for size in asked.values()]
    for (key, size), count in zip(asked.items(), sizes):
        if size and not count:
            raise ValueError(f"{key}={size:g} of {len(units)} {what} is none: raise it, or leave it out")
    if sum(sizes) >= len(units) > 0:
        raise ValueError(
            f"val_size={config.val_size:g}, test_size={config.test_size:g} take {sum(sizes)} of {len(units)} {what}: "
            "nothing is left to train on; make them smaller"
        )
    fate = np.full(len(keys), TRAIN, dtype=np.int8)
    if sum(sizes):
        val, test = draw(keys, units, config.seed, *sizes)
        fate[val], fate[test] = VAL, TEST
    return fate
