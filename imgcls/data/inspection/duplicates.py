"""The same picture more than once: in both sets, in one of them, or under two labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from imgcls.data.inspection.findings import NOTE, SERIOUS, WARNING, Finding, first
from imgcls.data.inspection.near import TooManyCandidates, near_pairs
from imgcls.data.inspection.survey import Survey

# How two pictures are the same: a code for scripts, and words.
HOW = {"file": "the same file", "pixels": "the same pixels", "near": "nearly the same pixels"}


@dataclass(frozen=True)
class Twin:
    """Two pictures that are the same: survey and row of each, the training set's first; ``how`` a key of HOW."""

    one: tuple[Survey, int]
    other: tuple[Survey, int]
    how: str

    @property
    def crosses(self) -> bool:
        """Whether one is a training picture and the other is not."""
        return self.one[0].role != self.other[0].role

    @property
    def disagrees(self) -> bool:
        """Whether the two have different labels."""
        return self._labels()[0] != self._labels()[1]

    def _labels(self) -> tuple[str, str]:
        (a, row), (b, other) = self.one, self.other
        return a.label_names(row), b.label_names(other)

    def __str__(self) -> str:
        (a, row), (b, other) = self.one, self.other
        if self.disagrees:
            return f"{a.name(row)} is {a.label_names(row)}, {b.name(other)} is {b.label_names(other)}"
        return f"{a.name(row)} = {b.name(other)}"


def duplicate_findings(surveys: Sequence[Survey]) -> list[Finding]:
    """Leaks between the sets, copies inside each, and copies whose labels differ."""
    twins, notes = find_twins(surveys)
    found = []
    for how, words in HOW.items():
        leaks = [twin for twin in twins if twin.how == how and twin.crosses]
        if leaks:
            found.append(_leak(leaks, how, words))
    quarrels = [twin for twin in twins if twin.disagrees]
    if quarrels:
        found.append(
            Finding(
                SERIOUS,
                "label_conflict",
                _where(quarrels),
                len(quarrels),
                "pairs of the same picture with different labels",
                first(map(str, quarrels)),
                "decide for one label each, and remove the other copy",
            )
        )
    for survey in surveys:
        for how, words in HOW.items():
            copies = [twin for twin in twins if twin.how == how and not twin.crosses and twin.one[0] is survey]
            if copies:
                found.append(_copies(survey, copies, how, words))
    return found + notes


def _leak(leaks: list[Twin], how: str, words: str) -> Finding:
    return Finding(
        SERIOUS,
        f"leak_{how}",
        "train, val",
        len({twin.other[1] for twin in leaks}),
        f"pictures of val that are in train too ({words}): results on val would be too good",
        first(map(str, leaks)),
        "remove them from train or from val",
    )


def _copies(survey: Survey, copies: list[Twin], how: str, words: str) -> Finding:
    return Finding(
        WARNING,
        f"copies_{how}",
        survey.role,
        len({twin.other[1] for twin in copies}),
        f"pictures that are in {survey.role} more than once ({words}): they count for more than others",
        first(map(str, copies)),
        "remove all but one of each",
    )


def _where(twins: list[Twin]) -> str:
    roles = {survey.role for twin in twins for survey, _ in (twin.one, twin.other)}
    return ", ".join(role for role in ("train", "val") if role in roles)


def find_twins(surveys: Sequence[Survey]) -> tuple[list[Twin], list[Finding]]:
    """All pairs, each in the strictest sense in which it is one; and what is to be known about the search."""
    places = [(survey, int(row)) for survey in surveys for row in np.flatnonzero(survey.good)]
    contents = [survey.contents[row] for survey, row in places]
    pixels = [survey.pixels[row] for survey, row in places]
    twins = [Twin(places[a], places[b], "file") for a, b in _equal(contents, places)]
    twins += [Twin(places[a], places[b], "pixels") for a, b in _equal(pixels, places) if contents[a] != contents[b]]
    # One of each exact copy in each set stands for all: what is near to it is near to its copies.
    standing: dict[tuple[str, bytes], int] = {}
    for place, ((survey, _), digest) in enumerate(zip(places, pixels, strict=True)):
        standing.setdefault((survey.role, digest), place)
    ones = list(standing.values())
    if not ones:
        return twins, []
    try:
        pairs, _ = near_pairs(np.stack([places[one][0].thumbs[places[one][1]] for one in ones]))
    except TooManyCandidates as error:
        return twins, [_not_searched(surveys, str(error))]
    near = ((ones[a], ones[b]) for a, b in pairs)
    return twins + [Twin(places[a], places[b], "near") for a, b in near if pixels[a] != pixels[b]], []


def _equal(digests: Sequence[bytes], places: Sequence[tuple[Survey, int]]) -> Iterator[tuple[int, int]]:
    """Pairs of equal digests: each but the first of a set with that first, and each of val with the first of train."""
    groups: dict[bytes, list[int]] = {}
    for place, digest in enumerate(digests):
        groups.setdefault(digest, []).append(place)
    for group in groups.values():
        firsts: dict[str, int] = {}
        for place in group:
            firsts.setdefault(places[place][0].role, place)
        for place in group:
            yield from ((one, place) for one in firsts.values() if one < place)


def _not_searched(surveys: Sequence[Survey], reason: str) -> Finding:
    what = f"near copies were not searched for: {reason}"
    number = sum(map(len, surveys))
    return Finding(NOTE, "near_not_searched", "train, val", number, what, (), "look at fewer pictures: --sample N")
