"""Pairs of pictures that show the same thing: re-encoded, resized, brightened or slightly cropped.

Perceptual hashes find candidates fast, small thumbnails confirm them. Drawings and scans are alike without being
copies; so a pair counts only if it is far more alike than its pictures are to others of the set.
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from imgcls.data.inspection.fingerprint import THUMB

RADIUS = 8  # bits of 64 in which the hashes of candidates may differ
CROPPED_RADIUS = 4  # the same where one of them is a part of the picture: there are ten times as many
LIKENESS = 0.95  # correlation of thumbnails that a pair needs at least
# How far a pair must stand out: by so much its correlation, as Fisher's z (artanh), exceeds that with other pictures.
MARGIN = 1.5
OTHERS = 512  # pictures drawn to be these others
COPIES = 3  # of them are left out, the most alike: they may be copies themselves
FLAT = 4.0  # grey levels: a thumbnail that varies less (standard deviation) has nothing to compare
MAX_CANDIDATES = 30_000_000  # pairs; beyond, the pictures are too alike for this search

_SIDE = 32  # pixels that the hash is made from
_SMALL = 16  # pixels, side of what is correlated
# (top, bottom, left, right) of the thumbnail: the whole; 2.5 % and 5 % off every side; 5 % off one side or two.
_WINDOWS = (
    (0, THUMB, 0, THUMB),
    (1, THUMB - 1, 1, THUMB - 1),
    (2, THUMB - 2, 2, THUMB - 2),
    *(
        (top, bottom, left, right)
        for top, bottom in ((0, THUMB), (0, THUMB - 2), (2, THUMB))
        for left, right in ((0, THUMB), (0, THUMB - 2), (2, THUMB))
        if bottom - top < THUMB or right - left < THUMB
    ),
)
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # (first bit, bits)
_CHUNK = 1 << 12  # pairs or pictures compared at a time
_BITS_SET = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)


class TooManyCandidates(ValueError):
    """The pictures are so much alike that hashes do not tell them apart."""


def near_pairs(thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows that show the same picture, (M, 2) int64 with the smaller row first, and their likeness, (M,).

    thumbs: (N, THUMB, THUMB) uint8. Flat ones are in no pair.
    """
    usable = np.flatnonzero(thumbs.reshape(len(thumbs), -1).std(axis=1) >= FLAT)
    if len(usable) < 2:
        return np.zeros((0, 2), dtype=np.int64), np.zeros(0)
    thumbs = thumbs[usable]
    pairs = candidates(hashes(thumbs))
    rows, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(pairs.shape)
    small = _descriptors(thumbs[rows])
    likeness = _likeness(small, places)
    needed = np.maximum(np.arctanh(LIKENESS), _likeness_to_others(small[:, 0], rows, thumbs) + MARGIN)
    found = np.arctanh(np.minimum(likeness, 0.999999)) > needed[places].max(axis=1, initial=0.0)
    return usable[pairs[found]], likeness[found]


def hashes(thumbs: np.ndarray) -> np.ndarray:
    """(N, windows) uint64: of each window of each thumbnail the DCT hash.

    Bit k says whether the k-th of the 8 x 8 lowest frequencies exceeds their median (C. Zauner, "Implementation and
    benchmarking of perceptual image hash functions", 2010, section 3.2.1).
    """
    found = np.zeros((len(thumbs), len(_WINDOWS)), dtype=np.uint64)
    weights = np.uint64(1) << np.arange(64, dtype=np.uint64)
    for row, thumb in enumerate(thumbs):
        low = np.stack([cv2.dct(values)[:8, :8].ravel() for values in _windows(thumb, _SIDE)])
        found[row] = (low > np.median(low[:, 1:], axis=1, keepdims=True)) @ weights
    return found


def candidates(codes: np.ndarray) -> np.ndarray:
    """(M, 2) int64, each pair of rows (smaller first) of which a window's hash is near the other's whole picture's.

    By the pigeonhole principle, codes that differ in at most 4 bits agree in one of five bands, and codes that differ
    in at most 9 differ in at most one bit of one of them (Norouzi et al., "Fast search in Hamming space with
    multi-index hashing", CVPR 2012): so only codes that share a band, of thousands of values, are compared.
    """
    number = len(codes)
    keys = np.zeros(0, dtype=np.int64)
    for first_bit, bits in _BANDS:
        new = [pair for window in range(codes.shape[1]) for pair in _sharing_band(codes, window, first_bit, bits)]
        keys = np.unique(np.concatenate([keys, *new]))
        if len(keys) > MAX_CANDIDATES:
            raise TooManyCandidates(f"more than {MAX_CANDIDATES:,} pairs of {number:,} pictures have like hashes")
    return np.stack([keys // number, keys % number], axis=1)


def _sharing_band(codes: np.ndarray, window: int, first_bit: int, bits: int) -> Iterator[np.ndarray]:
    """smaller row x number of rows + larger row, of the near pairs that share a band up to one bit."""
    number = len(codes)
    whole, asked = codes[:, 0], codes[:, window]
    bands = (codes >> np.uint64(first_bit)).astype(np.int64) & ((1 << bits) - 1)
    order = np.argsort(bands[:, 0], kind="stable")
    starts = np.searchsorted(bands[order, 0], np.arange((1 << bits) + 1))
    radius = CROPPED_RADIUS if window else RADIUS
    for flip in [0] if window else [0, *(1 << bit for bit in range(bits))]:
        wanted = bands[:, window] ^ flip
        first, counts = starts[wanted], starts[wanted + 1] - starts[wanted]
        for rows in _shares(counts):
            row = np.repeat(rows, counts[rows])
            within = np.arange(len(row)) - np.repeat(np.cumsum(counts[rows]) - counts[rows], counts[rows])
            other = order[first[row] + within]
            near = (row != other) & (distance(asked[row], whole[other]) <= radius)
            low, high = np.minimum(row[near], other[near]), np.maximum(row[near], other[near])
            yield np.unique(low * number + high)


def _shares(counts: np.ndarray) -> Iterator[np.ndarray]:
    """Rows in runs whose ``counts`` sum to some millions at most, so that memory stays small."""
    which = np.cumsum(counts) // (1 << 22)
    edges = np.flatnonzero(np.diff(which)) + 1
    yield from np.split(np.arange(len(counts)), edges)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """In how many bits 64-bit codes differ (Hamming), elementwise."""
    if hasattr(np, "bitwise_count"):  # from NumPy 2 on, and several times as fast
        return np.bitwise_count(a ^ b)
    return _BITS_SET[(a ^ b).view(np.uint16)].reshape(-1, 4).sum(axis=1)


def _windows(thumb: np.ndarray, side: int) -> Iterator[np.ndarray]:
    for top, bottom, left, right in _WINDOWS:
        window = thumb[top:bottom, left:right].astype(np.float32)
        yield cv2.resize(window, (side, side), interpolation=cv2.INTER_AREA)


def _descriptors(thumbs: np.ndarray) -> np.ndarray:
    """(N, windows, 256) float16 of mean 0 and length 1: their products are correlations."""
    found = np.zeros((len(thumbs), len(_WINDOWS), _SMALL * _SMALL), dtype=np.float16)
    for row, thumb in enumerate(thumbs):
        values = np.stack([window.ravel() for window in _windows(thumb, _SMALL)])
        values -= values.mean(axis=1, keepdims=True)
        found[row] = values / (np.linalg.norm(values, axis=1, keepdims=True) + 1e-6)
    return found


def _likeness(small: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The largest correlation, over all windows of one against the whole of the other."""
    found = np.zeros(len(pairs), dtype=np.float32)
    for start in range(0, len(pairs), _CHUNK):
        one, other = pairs[start : start + _CHUNK].T
        a, b = small[one].astype(np.float32), small[other].astype(np.float32)
        products = (np.einsum("nwd,nd->nw", a, b[:, 0]), np.einsum("nd,nwd->nw", a[:, 0], b))
        found[start : start + len(one)] = np.maximum(*products).max(axis=1)
    return found


def _likeness_to_others(small: np.ndarray, rows: np.ndarray, thumbs: np.ndarray) -> np.ndarray:
    """Fisher's z of the correlation of each row's picture with the most alike of ``OTHERS``, its possible copies aside.

    small: (M, 256) descriptors of the pictures ``thumbs[rows]``, whole.
    """
    number = len(thumbs)
    if number <= COPIES + 1:
        return np.zeros(len(rows))
    drawn = np.random.default_rng(0).permutation(number)[:OTHERS]
    others = _descriptors(thumbs[drawn])[:, 0].astype(np.float32)
    place = max(0, len(drawn) - COPIES - 1)
    found = np.zeros(len(rows))
    for start in range(0, len(rows), _CHUNK):
        block = slice(start, start + _CHUNK)
        products = small[block].astype(np.float32) @ others.T
        products[rows[block, None] == drawn] = -1.0
        found[block] = np.partition(products, place, axis=1)[:, place]
    return np.arctanh(np.clip(found, -0.99, 0.999999))
