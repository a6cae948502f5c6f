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
    reason = np.zeros(len(spool), dtype=np.uint8)
    leader = np.arange(len(spool))
    reason[first_of_equals(_within(spool.id_keys, spool.role)) != leader] = SAME_ID
    scope = spool.role
    if mapping is not None:
        rows = leader.copy()
        scope = scope.astype(np.int64)
        is_member = spool.role == MEMBER
        reason[is_member & (mapping.owner < 0) & (reason == KEPT)] = UNUSED
        reason[(spool.role == TRAIN) & ~mapping.mapped & (reason == KEPT)] = UNMAPPED
        # each UniRef50 record is a scope of its own: it stands for its cluster, whatever its sequence
        scope = np.where(is_member, len(rows) + mapping.owner, np.where(spool.role == TRAIN, rows, -1 - scope))
    elif table is not None and table.split is not None:
        scope = scope + 4 * table.split.astype(np.uint8)  # as with files: of equal ones train gives way, not the first
    alive = np.flatnonzero(reason == KEPT)
    if len(alive) == len(leader):  # the usual case, without copies
        leader = first_of_equals(_within(spool.sequence_keys, scope))
    else:
        leader[alive] = alive[first_of_equals(_within(spool.sequence_keys[alive], scope[alive]))]
    if config.duplicates == "drop":
        reason[alive[leader[alive] != alive]] = EQUAL
    split = spool.role.astype(np.int8)
    if mapping is not None:
        cluster = _split_mapping(spool, config, mapping, split, reason)
    else:
        cluster = _split_units(spool, config, table, leader, split, reason)
    _drop_leaks(spool.sequence_keys, split, reason)
    split[reason != KEPT] = NOWHERE
    return Decision(split, reason, cluster if table is not None or mapping is not None else None)


def _within(keys: np.ndarray, scope: np.ndarray) -> np.ndarray:
    """Keys that are equal only within a scope."""
    if len(scope) == 0 or scope.min() == scope.max():
        return keys
    mixed = keys.copy()
    mixed[:, 0] ^= scope.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mixed


def _split_units(
    spool: Spool,
    config: PrepareConfig,
    table: Assignment | None,
    leader: np.ndarray,
    split: np.ndarray,
    reason: np.ndarray,
) -> np.ndarray:
    """Draws from clusters, or from distinct sequences, of `input`. -> (N,) the unit of each row."""
    unit = leader
    own = np.flatnonzero((spool.role == TRAIN) & (reason == KEPT))
    keys = spool.id_keys
    if table is not None:
        keys = table.keys
        unit[own] = own[first_of_equals(keys[own])]
        if table.split is not None:
            split[own] = table.split[own]
            return unit
    if not config.val_size and not config.test_size:
        return unit
    units = own if table is None and config.duplicates == "drop" else np.unique(unit[own])
    val, test = _draw(keys, units, config, "clusters" if table is not None else "distinct sequences")
    fate = np.zeros(len(split), dtype=np.int8)
    fate[val], fate[test] = VAL, TEST
    split[own] = fate[unit[own]]
    return unit


def _split_mapping(
    spool: Spool, config: PrepareConfig, mapping: Mapping, split: np.ndarray, reason: np.ndarray
) -> np.ndarray:
    """Draws from the clusters that have a member. -> (N,) the owner of each member, a UniRef50 record's own row."""
    members = np.flatnonzero((spool.role == MEMBER) & (reason == KEPT))
    own = np.flatnonzero((spool.role == TRAIN) & (reason == KEPT))
    owner = np.where(spool.role == MEMBER, mapping.owner, np.arange(len(split)))
    filled = np.isin(own, owner[members])
    reason[own[~filled]] = EMPTY
    units = own[filled]
    val, test = _draw(spool.id_keys, units, config, "clusters")
    fate = np.zeros(len(split), dtype=np.int8)
    fate[val], fate[test] = VAL, TEST
    split[units] = fate[units]
    reason[units[split[units] == TRAIN]] = UNUSED  # the text to train on is the members'
    reason[members[fate[owner[members]] != TRAIN]] = UNUSED
    split[members] = TRAIN
    return owner


def _draw(keys: np.ndarray, units: np.ndarray, config: PrepareConfig, what: str) -> list[np.ndarray]:
    sizes = [round(size) if size >= 1 else round(size * len(units)) for size in (config.val_size, config.test_size)]
    if sum(sizes) >= len(units) > 0:
        raise ValueError(
            f"val_size={config.val_size:g}, test_size={config.test_size:g} take {sum(sizes)} of {len(units)} {what}: "
            "nothing is left to train on; make them smaller"
        )
    return draw(keys, units, config.seed, *sizes)


def _drop_leaks(keys: np.ndarray, split: np.ndarray, reason: np.ndarray) -> None:
    rows = np.flatnonzero(reason == KEPT)
    kept = split[rows]
    if len(rows) == 0 or kept.min() == kept.max():
        return
    leader = first_of_equals(keys[rows])
    highest = kept.copy()
    np.maximum.at(highest, leader, kept)
    reason[rows[kept < highest[leader]]] = LEAK
