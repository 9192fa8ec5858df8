"""What every source promises of its labels and weights, and how grey pictures enter."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from imgcls.data import Source, build_test_loader, build_train_loader, open_source
from imgcls.data.datasets import ArraySource, ConcatSource, DictSource, FolderSource
from imgcls.engine.setup import finalize
from tests.conftest import write_image_folder

PIXELS = np.arange(4 * 6 * 6, dtype=np.uint8).reshape(4, 6, 6)
ONE, SEVERAL = np.array([0, 1, 1, 0]), np.array([[1, 0], [1, 1], [0, 0], [0, 1]], dtype=np.float32)


def arrays(labels: np.ndarray, name: str = "some", weights: np.ndarray | None = None) -> ArraySource:
    source = ArraySource(name, PIXELS, labels, ["a", "b"], multi_label=labels.ndim == 2)
    source.weights = weights
    return source


@pytest.mark.parametrize("labels", [ONE, SEVERAL], ids=["one", "several"])
def test_samples_carry_the_labels_that_the_source_lists(labels: np.ndarray) -> None:
    source = arrays(labels)
    assert source.multi_label == (labels.ndim == 2)
    for index, sample in enumerate(source):
        assert np.array_equal(sample["label"], labels[index])
    assert isinstance(arrays(ONE)[0]["label"], int)


def test_one_set_after_another() -> None:
    both = ConcatSource([arrays(ONE), arrays(ONE[::-1], "more", np.full(4, 3.0))])
    assert both.labels is not None and both.labels.tolist() == [0, 1, 1, 0, 0, 1, 1, 0]
    assert both.weights is not None and both.weights.tolist() == [1, 1, 1, 1, 3, 3, 3, 3]
    assert ConcatSource([arrays(ONE), arrays(ONE)]).weights is None
    with pytest.raises(ValueError, match="pictures of more have several labels each, those of some one"):
        ConcatSource([arrays(ONE), arrays(SEVERAL, "more")])


@pytest.fixture
def registered() -> Iterator[Callable[..., Source]]:
    names = []

    def register(labels: list[object], **metadata: object) -> Source:
        names.append(f"mine_{len(names)}")
        samples = [{"file_name": f"{index}.png", "label": label} for index, label in enumerate(labels)]
        DatasetCatalog.register(names[-1], lambda: samples)
        MetadataCatalog.get(names[-1]).set(classes=["a", "b", "c"], **metadata)
        return open_source(names[-1])

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_labels_of_a_registered_set(registered: Callable[..., Source]) -> None:
    plain, mixed = registered([2, 0]), registered([[0.5, 0.5, 0.0], 2])
    several = registered([[1, 0, 1], [0, 0, 0]], multi_label=True)
    assert isinstance(plain, DictSource) and plain.labels is not None and plain.labels.tolist() == [2, 0]
    assert mixed.labels is not None and mixed.labels.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    assert (plain.multi_label, mixed.multi_label, several.multi_label) == (False, False, True)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_become_what_the_mean_has_entries_for(
    channels: int, classifier_cfg: Callable[..., CfgNode]
) -> None:
    cfg = classifier_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [100.0] * channels, [50.0] * channels
    cfg.INPUT.TRAIN_TRANSFORMS, cfg.INPUT.TEST_RESIZE, cfg.DATALOADER.NUM_WORKERS = [["resize"]], 0, 0
    colour = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    for pixels in (colour, colour[..., 0]):
        source = ArraySource("some", pixels, ONE, ["a", "b"])
        for loader in (build_train_loader(cfg, source), build_test_loader(cfg, source)):
            batch = next(iter(loader))
            assert batch.images.shape[1:] == (channels, 32, 32)
            expected = Image.fromarray(pixels[int(batch.ids[0])]).convert("L" if channels == 1 else "RGB")
            assert torch.equal(batch.images[0].permute(1, 2, 0).squeeze(-1), torch.from_numpy(np.array(expected)))


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_files_are_looked_at_first_only_where_a_bad_one_ends_the_run(
    on_error: str, classifier_cfg: Callable[..., CfgNode], tmp_path
) -> None:
    write_image_folder(tmp_path, {"ant": 4, "bee": 4})
    (tmp_path / "bee" / "002.png").write_text("an error page")
    names = (f"folder:{tmp_path}",)
    cfg = classifier_cfg(
        "mobilenet_v1_0.25", "DATASETS.TRAIN", names, "DATASETS.TEST", (), "DATALOADER.ON_ERROR", on_error
    )
    if on_error == "skip":
        assert isinstance(finalize(cfg)[1].train, FolderSource)
    else:
        with pytest.raises(ValueError, match=r"cannot read the image .*bee/002\.png"):
            finalize(cfg)
