"""Whether a label means the same class in train and val: by the names, and by what the pictures look like."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from imgcls.data.datasets.source import Source
from imgcls.data.inspection.findings import NOTE, SERIOUS, WARNING, Finding, first
from imgcls.data.inspection.survey import Survey

# Pictures compared, at most, of train and of val; but never fewer than so many a class.
TRAIN_PICTURES, VAL_PICTURES = 20_000, 5_000
TRAIN_OF_CLASS, VAL_OF_CLASS = 60, 30
LEAST_OF_CLASS = 5  # a class with fewer pictures in either set is not judged
SHUFFLES = 2_000
CHANCE = 0.001  # largest share of the shuffles that may do as well as what was found


def name_findings(train: Source, val: Source) -> list[Finding]:
    """Classes that only one of the sets has, or has in another place."""
    extra, lacking = _only_in(val, train), _only_in(train, val)
    found = []
    if extra:
        found.append(_extra(extra, lacking, train))
    if lacking:
        found.append(
            Finding(
                WARNING,
                "class_not_in_val",
                "val",
                len(lacking),
                "classes of train that val has nothing of: no figure will speak of them",
                first(lacking),
                "add pictures of them to val",
            )
        )
    shared = [name for name in val.classes if name in set(train.classes)]
    moved = [name for name in shared if train.classes.index(name) != val.classes.index(name)]
    if moved and not (extra or lacking):
        lines = (f"{name}: {train.classes.index(name)} in train, {val.classes.index(name)} in val" for name in moved)
        what = "classes have another number in val than in train; imgcls goes by the names, other programs may not"
        found.append(Finding(NOTE, "class_order", "train, val", len(moved), what, first(lines), "give one order"))
    return found


def _extra(extra: list[str], lacking: list[str], train: Source) -> Finding:
    what = "classes of val that train has not: they cannot be evaluated"
    if len(extra) == len(lacking) and all(name.isdecimal() for name in (*train.classes, *extra)):
        what += "; the numbers are shifted, as if the folders had been renumbered"
    remedy = "rename these folders of val as in train, or remove them; DATASETS.TEST"
    return Finding(SERIOUS, "class_not_in_train", "val", len(extra), what, first(extra), remedy)


def _only_in(one: Source, other: Source) -> list[str]:
    return sorted(set(one.classes) - set(other.classes))


def spelling_findings(source: Source, role: str) -> list[Finding]:
    """Class names that are easily taken for others, and folders that are passed over."""
    found = []
    by_lower: dict[str, list[str]] = defaultdict(list)
    for name in source.classes:
        by_lower[name.casefold()].append(name)
    alike = [" / ".join(names) for names in by_lower.values() if len(names) > 1]
    if alike:
        what = "class names that differ in upper and lower case alone: two classes here, one on some file systems"
        found.append(Finding(WARNING, "class_case", role, len(alike), what, first(alike), "rename one of each"))
    numbers = source.classes
    if all(name.isdecimal() for name in numbers) and list(numbers) != sorted(numbers, key=int):
        lines = (f"{name!r} is class {index}" for index, name in enumerate(numbers) if int(name) != index)
        what = "classes are numbers, sorted as text: a class's number is not its name"
        remedy = "nothing, if you go by names; or write them with leading zeros"
        found.append(Finding(NOTE, "class_numbers", role, len(numbers), what, first(lines), remedy))
    hidden = _hidden_folders(source)
    if hidden:
        what = "hidden folders that are no classes"
        found.append(Finding(NOTE, "hidden_folders", role, len(hidden), what, first(hidden), "nothing, or rename them"))
    return found


def _hidden_folders(source: Source) -> list[str]:
    root = getattr(source, "root", None)
    if root is None or not Path(root).is_dir():
        return []
    return sorted(str(path) for path in Path(root).iterdir() if path.is_dir() and path.name.startswith("."))


def swap_findings(train: Survey, val: Survey) -> list[Finding]:
    """Classes whose pictures in val look like another class of train, and that one's like theirs.

    Each picture of val is given the class of the train picture that is nearest in a thumbnail of COLOUR x COLOUR
    colours. That is a poor classifier, but it need not be good: exchanged classes show as a circle (the pictures of a
    go to b, those of b go to a), and shuffling the labels within the circle says how often chance does as well. Classes
    that thumbnails do not tell apart are not judged, and a class that was filled with something new is no circle.
    """
    if train.labels.ndim > 1 or val.labels.ndim > 1:
        return []
    names = train.source.classes
    index_of = {name: index for index, name in enumerate(names)}
    theirs = np.array([index_of.get(name, -1) for name in val.source.classes] + [-1])  # -1 stays -1
    found = []
    for circle, shares, chance in exchanged(
        train.colours[train.good], train.labels[train.good], val.colours[val.good], theirs[val.labels[val.good]]
    ):
        lines = [
            f"val's {names[a]!r}: {share:.0%} look like train's {names[b]!r}, {own:.0%} like its own class"
            for a, b, (share, own) in zip(circle, circle[1:] + circle[:1], shares, strict=True)
        ]
        what = f"classes of val that seem to be exchanged (chance: {max(chance, 1 / SHUFFLES):.4f} or less)"
        remedy = "look at these folders of val; if they are exchanged, rename them"
        found.append(Finding(WARNING, "classes_exchanged", "train, val", len(circle), what, first(lines), remedy))
    return found


def exchanged(
    train: np.ndarray, train_labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray
) -> list[tuple[list[int], list[tuple[float, float]], float]]:
    """Circles of classes: (classes, of each the shares of its val pictures that go to the next and to itself, chance).

    train, val: (N, ...) uint8 pictures; labels: (N,) in one numbering, -1 for none.
    """
    rows = _drawn(train_labels, TRAIN_PICTURES, TRAIN_OF_CLASS)
    asked = _drawn(val_labels, VAL_PICTURES, VAL_OF_CLASS)
    judged = np.intersect1d(train_labels[rows], val_labels[asked])
    rows, asked = rows[np.isin(train_labels[rows], judged)], asked[np.isin(val_labels[asked], judged)]
    if len(judged) < 2:
        return []
    distances = _to_classes(train[rows], np.searchsorted(judged, train_labels[rows]), val[asked])
    labels = np.searchsorted(judged, val_labels[asked])
    nearest = distances.argmin(axis=1)
    votes = np.zeros((len(judged), len(judged)))
    np.add.at(votes, (labels, nearest), 1)
    # Some classes attract whatever comes: what counts is how much more of one class goes there than of all.
    liked = votes / (votes.mean(axis=0) + 1)
    found = []
    for circle in _circles(liked.argmax(axis=1)):
        shares, chance = _judge(circle, labels, distances)
        if chance <= CHANCE and all(next_one > own for next_one, own in shares):
            found.append(([int(judged[place]) for place in circle], shares, chance))
    return found


def _drawn(labels: np.ndarray, most: int, of_class: int) -> np.ndarray:
    """Rows of an even choice of every class that has enough."""
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    share = max(of_class, most // max(1, len(classes)))
    random = np.random.default_rng(0)
    chosen = [
        np.sort(random.permutation(np.flatnonzero(labels == name))[:share])
        for name, count in zip(classes, counts, strict=True)
        if count >= LEAST_OF_CLASS
    ]
    return np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)


def _to_classes(train: np.ndarray, labels: np.ndarray, val: np.ndarray) -> np.ndarray:
    """(len(val), classes): squared distance of each val picture to the nearest train picture of each class."""
    order = np.argsort(labels, kind="stable")
    points = train[order].reshape(len(train), -1).astype(np.float32) / 255
    starts = np.searchsorted(labels[order], np.arange(labels.max() + 1))
    squares = (points**2).sum(axis=1)
    found = []
    for first_row in range(0, len(val), 512):
        asked = val[first_row : first_row + 512].reshape(-1, points.shape[1]).astype(np.float32) / 255
        all_distances = squares - 2 * (asked @ points.T) + (asked**2).sum(axis=1, keepdims=True)
        found.append(np.minimum.reduceat(all_distances, starts, axis=1))
    return np.concatenate(found)


def _circles(following: np.ndarray) -> list[list[int]]:
    """The circles of two and more in ``place -> following[place]``, each once, from its smallest place on."""
    found = []
    for start in range(len(following)):
        path = [start]
        while following[path[-1]] not in path:
            path.append(int(following[path[-1]]))
        if following[path[-1]] == start == min(path) and len(path) > 1:
            found.append(path)
    return found


def _judge(circle: list[int], labels: np.ndarray, distances: np.ndarray) -> tuple[list[tuple[float, float]], float]:
    """Of each class of the circle the shares that go to the next and to itself; and how often shuffled labels do so."""
    inside = np.isin(labels, circle)
    where = np.array([circle.index(label) for label in labels[inside]])
    nearest = distances[inside][:, circle].argmin(axis=1)
    shares = [
        (
            float((nearest[where == place] == (place + 1) % len(circle)).mean()),
            float((nearest[where == place] == place).mean()),
        )
        for place in range(len(circle))
    ]

    def surplus(labels_of: np.ndarray) -> int:
        return int((nearest == (labels_of + 1) % len(circle)).sum() - (nearest == labels_of).sum())

    random = np.random.default_rng(0)
    seen = surplus(where)
    better = sum(surplus(random.permutation(where)) >= seen for _ in range(SHUFFLES))
    return shares, (1 + better) / (1 + SHUFFLES)
