"""Pascal VOC annotations (one XML per image) written as one COCO JSON per split.

Layout read: ``root/JPEGImages``, ``root/Annotations/<id>.xml``, ``root/ImageSets/Main/<split>.txt``.

Coordinates. A VOC box holds 1-based pixel indices and includes its last pixel, so ``xmin=1, xmax=W`` is the
whole width. COCO and detectron2 use 0-based continuous coordinates, where the whole width is ``[0, W]``:
``x = xmin - 1``, ``y = ymin - 1``, ``width = xmax - x``, ``height = ymax - y``. This is the rule of
detectron2's own Pascal VOC loader, and a one-pixel box (``xmin == xmax``) keeps its width of 1.

Difficult objects. By default they become ``iscrowd=1``: detectron2 does not train on them, and in COCO
evaluation they are neither misses nor false alarms, which is what the VOC protocol asks for. Leaving them out
would count every correct detection of them as a false alarm, so that is not offered. ``keep_difficult``
makes them ordinary objects, trained on and counted. Either way an annotation has ``"difficult": 0 or 1``.

What is mended, and counted in the summary: boxes that reach over the image are clipped to it; boxes wholly
outside it are dropped; an image size absent from the XML (or 0) is read from the image; an image without
objects stays, without boxes. ``filename`` and ``folder`` in the XML are not trusted: the id in the split list
names both files. Everything else that is wrong is a ``ValueError``, and then nothing is written.
"""

from __future__ import annotations

import json
import math
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from imgcls.data.reading import read_size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

_FOLDERS = ("JPEGImages", "Annotations", "ImageSets/Main")


@dataclass
class _Counts:
    """What a conversion met; becomes the summary."""

    images: int = 0
    images_without_boxes: int = 0
    boxes: int = 0
    difficult: int = 0
    clipped: int = 0
    dropped: int = 0
    size_from_image: int = 0
    boxes_per_class: dict[str, int] = field(default_factory=dict)


def convert_voc(
    root: Path,
    split: str,
    output: Path,
    classes: Sequence[str] | None = None,
    keep_difficult: bool = False,
) -> dict[str, Any]:
    """Write one split of a VOC data set as COCO JSON, whole or not at all.

    Equal input gives equal bytes: image ids are 1, 2, ... in the order of the split list, annotation ids
    1, 2, ... in the order of the objects, category ids 1, 2, ... in the order of the classes.

    Args:
        root: the folder with ``JPEGImages``, ``Annotations`` and ``ImageSets``.
        split: a list in ``ImageSets/Main``, without ``.txt``.
        output: the JSON file to write; its folder is made, an older file is replaced.
        classes: names in the wanted order; by default all names in any XML of ``root``, sorted, so that
            every split has the same categories.
        keep_difficult: treat difficult objects as ordinary ones, not as ``iscrowd=1``.

    Returns:
        The summary: ``split``, ``output``, ``classes`` and the counts ``images``, ``images_without_boxes``,
        ``boxes`` (difficult ones included), ``difficult``, ``clipped``, ``dropped``, ``size_from_image``
        and ``boxes_per_class``.

    Raises:
        ValueError: something in the data set cannot be used; the message names file and remedy.
    """
    coco, summary = build_coco(root, split, classes, keep_difficult)
    write_json(coco, Path(output))
    return {**summary, "output": str(output)}


def build_coco(
    root: Path, split: str, classes: Sequence[str] | None = None, keep_difficult: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what :func:`convert_voc` would write, and its summary without ``output``.

    Raises:
        ValueError: as :func:`convert_voc`.
    """
    root = Path(root)
    check_layout(root)
    image_ids = _read_split(root, split)
    names = find_classes(root) if classes is None else _check_classes(classes)
    counts = _Counts(boxes_per_class=dict.fromkeys(names, 0))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    files = _index_images(root / "JPEGImages")
    for number, voc_id in enumerate(image_ids, start=1):
        xml_path = root / "Annotations" / f"{voc_id}.xml"
        image_path = _find_image(files, voc_id, root)
        tree = _parse_xml(xml_path)
        width, height = _image_size(tree, xml_path, image_path, counts)
        images.append({"id": number, "file_name": image_path.name, "width": width, "height": height})
        found = list(_convert_objects(tree, xml_path, names, (width, height), counts))
        counts.images_without_boxes += not found
        for item in found:
            crowd = int(bool(item["difficult"]) and not keep_difficult)
            ids = {"id": len(annotations) + 1, "image_id": number, "iscrowd": crowd}
            annotations.append({**ids, **item})
    counts.images, counts.boxes = len(images), len(annotations)
    coco = {
        "info": {"description": f"Pascal VOC annotations, split {split}"},
        "licenses": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
        "images": images,
        "annotations": annotations,
    }
    return coco, {"split": split, "classes": names, **asdict(counts)}


def find_classes(root: Path) -> list[str]:
    """Return the sorted names of all objects in all annotations of a VOC root, whatever their split.

    Raises:
        ValueError: an XML cannot be used, or there is no object in any of them.
    """
    folder = Path(root) / "Annotations"
    names = {
        _object_name(item, number, path)
        for path in sorted(folder.glob("*.xml"))
        for number, item in enumerate(_parse_xml(path).findall("object"), start=1)
    }
    if not names:
        raise ValueError(
            f"{folder} has no XML with an object, so there are no class names; "
            f"check the root, or state the classes (--classes)"
        )
    return sorted(names)


def check_layout(root: Path) -> None:
    """Raise ``ValueError`` where a folder that every VOC root has is missing."""
    for name in _FOLDERS:
        if not (root / name).is_dir():
            raise ValueError(
                f"{root} has no folder {name}; a VOC root has {', '.join(_FOLDERS)}; "
                f"pass the folder that holds them (--root)"
            )


def _check_classes(classes: Sequence[str]) -> list[str]:
    """A lone string is refused because it would pass as a list of letters."""
    names = [] if isinstance(classes, str) else list(classes)
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(
            f"classes is {classes!r}; allowed is a list of at least one name; change --classes or leave it out"
        )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"classes names {repeated} more than once in {names}; each name may stand once; change --classes"
        )
    return names


def _read_split(root: Path, split: str) -> list[str]:
    folder = root / "ImageSets" / "Main"
    there = sorted(path.stem for path in folder.glob("*.txt"))
    path = folder / f"{split}.txt"
    if split not in there:
        raise ValueError(f"no split {split!r} in {folder}; the splits there are {there}; change --splits")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    image_ids = [
        _split_line_id(line, root / "Annotations", f"{path} line {number}")
        for number, line in enumerate(lines, start=1)
        if line
    ]
    if not image_ids:
        raise ValueError(f"split list {path} is empty; it needs one image id a line; the splits there are {there}")
    repeated = sorted(name for name, count in Counter(image_ids).items() if count > 1)
    if repeated:
        raise ValueError(f"{path} lists {repeated[0]!r} more than once; every id may stand once; remove it")
    return image_ids


def _split_line_id(line: str, annotations: Path, where: str) -> str:
    """Return the image id of a line; VOC's per-class lists have a number behind it, as ``000001  -1``.

    A name may itself end in a blank and a number, so a line that names an annotation as a whole stays whole.
    """
    if "/" in line or "\\" in line:
        raise ValueError(f"{where} is {line!r}; an id is a file name without folder; remove the folder")
    if (annotations / f"{line}.xml").is_file():
        return line
    name = re.sub(r"\s+[+-]?\d+$", "", line)
    if not (annotations / f"{name}.xml").is_file():
        raise ValueError(
            f"{where} names {name!r}, but {annotations / name}.xml is missing; "
            f"every id needs an annotation; add the file or remove the line"
        )
    return name


def _index_images(folder: Path) -> dict[str, list[Path]]:
    """Map image id to files; one listing, since a look-up per suffix and letter case is slow on shares."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            files.setdefault(path.stem, []).append(path)
    return files


def _find_image(files: dict[str, list[Path]], voc_id: str, root: Path) -> Path:
    found = files.get(voc_id, [])
    if len(found) != 1:
        problem = f"more than one image: {[path.name for path in found]}" if found else "no image"
        raise ValueError(
            f"{root / 'JPEGImages'} has {problem} for id {voc_id!r}; allowed is one file that ends in one of "
            f"{', '.join(IMAGE_SUFFIXES)}; mend the folder or take the id off the split list"
        )
    return found[0]


def _parse_xml(path: Path) -> ET.Element:
    """Parse without ever expanding an entity: a DOCTYPE, the only place to declare one, ends the parse."""
    builder = ET.TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(path.read_bytes(), True)
    except (expat.ExpatError, LookupError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be used as annotation: {error}; allowed is well-formed XML without a DOCTYPE or "
            f"ENTITY declaration; mend the file"
        ) from error
    element = builder.close()
    if element.tag != "annotation":
        raise ValueError(f"{path} has the root element <{element.tag}>; a VOC file has <annotation>; replace the file")
    return element


def _refuse_doctype(*_: object) -> None:
    raise ValueError("it has a DOCTYPE, through which a file can expand without limit")


def _image_size(tree: ET.Element, xml_path: Path, image_path: Path, counts: _Counts) -> tuple[int, int]:
    """Return (width, height) in pixels of the image as detectron2 will see it, checked against the XML."""
    actual = read_size(str(image_path))
    stated = tuple(_stated_length(tree, key, xml_path) for key in ("width", "height"))
    if 0 in stated:
        counts.size_from_image += 1
    elif stated != actual:
        raise ValueError(
            f"{xml_path} states an image of {stated[0]}x{stated[1]}, but {image_path} is "
            f"{actual[0]}x{actual[1]} when loaded (EXIF rotation applied); its boxes may be meant for another "
            f"image; mend the file, or remove <size> if the boxes do fit"
        )
    return actual


def _stated_length(tree: ET.Element, key: str, path: Path) -> int:
    """Return the stated width or height; 0 where there is none."""
    text = (tree.findtext(f"size/{key}") or "").strip() or "0"
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and value.is_integer()):
        raise ValueError(f"{path} has size/{key} = {text!r}; allowed is a whole number of pixels; mend or remove it")
    return int(value)


def _convert_objects(
    tree: ET.Element, path: Path, names: list[str], size: tuple[int, int], counts: _Counts
) -> Iterator[dict[str, Any]]:
    """Yield the objects of one image, counting what is mended; the ids are added by the caller."""
    for number, item in enumerate(tree.findall("object"), start=1):
        name = _object_name(item, number, path)
        if name not in names:
            raise ValueError(f"{path} object {number} is named {name!r}; allowed are {names}; add it to --classes")
        box = _read_box(item, f"{path} object {number} ({name})")
        kept = _clip(box, size)
        if kept is None:
            counts.dropped += 1
            continue
        difficult = _is_difficult(item, f"{path} object {number} ({name})")
        counts.clipped += kept != box
        counts.difficult += difficult
        counts.boxes_per_class[name] += 1
        x0, y0, x1, y1 = kept
        yield {
            "category_id": names.index(name) + 1,
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": (x1 - x0) * (y1 - y0),
            "difficult": int(difficult),
        }


def _object_name(item: ET.Element, number: int, path: Path) -> str:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise ValueError(f"{path} object {number} has no <name>; every object needs one; mend the file")
    return name


def _read_box(item: ET.Element, where: str) -> tuple[float, float, float, float]:
    """Return (x0, y0, x1, y1) in 0-based continuous pixels, not yet clipped."""
    xmin, ymin, xmax, ymax = (_coordinate(item, key, where) for key in ("xmin", "ymin", "xmax", "ymax"))
    if xmax < xmin or ymax < ymin:
        raise ValueError(
            f"{where} has the box xmin={xmin:g}, ymin={ymin:g}, xmax={xmax:g}, ymax={ymax:g}; "
            f"xmax must not be below xmin, nor ymax below ymin; mend the file"
        )
    return xmin - 1, ymin - 1, xmax, ymax


def _coordinate(item: ET.Element, key: str, where: str) -> float:
    text = item.findtext(f"bndbox/{key}")
    try:
        value = math.nan if text is None else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} has bndbox/{key} = {text!r}; allowed is a number; mend the file")
    return value


def _is_difficult(item: ET.Element, where: str) -> bool:
    text = (item.findtext("difficult") or "").strip() or "0"
    if text not in ("0", "1"):
        raise ValueError(f"{where} has difficult = {text!r}; allowed are 0 and 1; mend the file")
    return text == "1"


def _clip(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """Cut a box to the image; None where nothing is left."""
    width, height = size
    x0, y0 = max(box[0], 0.0), max(box[1], 0.0)
    x1, y1 = min(box[2], float(width)), min(box[3], float(height))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write under a temporary name and rename, so that no reader sees half a file."""
    if path.is_dir():
        raise ValueError(f"output {path} is a folder; allowed is a file name; change --output")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
