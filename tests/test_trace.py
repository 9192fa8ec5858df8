"""DATALOADER.TRACE: which samples each iteration was trained on."""

from __future__ import annotations

import json
import shutil

import pytest
from test_loops import run_in_process

from imgcls.data import Loader
from imgcls.engine import Run, finalize
from imgcls.engine.replay import replay

SHORT = ("DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", (), "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("loop", ["plain", "builtin"])
def test_the_lines_are_the_batches_and_go_on_after_a_resume(loop, classifier_cfg, tmp_path, monkeypatch):
    seen, iterate = [], Loader.__iter__

    def watched(self):
        for batch in iterate(self):
            seen.append(batch.ids.tolist())
            yield batch

    monkeypatch.setattr(Loader, "__iter__", watched)
    path = tmp_path / "traces/trace.jsonl"
    cfg = classifier_cfg("mobilenet_v1_0.25", *SHORT, "DATALOADER.TRACE", str(path))
    run_in_process(loop, cfg)
    whole = lines(path)
    assert whole == [{"iteration": i, "ids": [ids]} for i, ids in enumerate(seen)] and len(whole) == 6
    assert len({i for ids in seen for i in ids}) == 6 * 8  # not one sample twice in an epoch

    folder = tmp_path / "run"
    for gone in ("model_final.pth", "model_final.pth.json"):
        (folder / gone).unlink()
    with path.open("a") as file:
        file.write('{"iteration": 6, "id')  # as a kill leaves it
    resumed, _ = run_in_process(loop, cfg, resume=True)
    assert resumed.start_iter == 4 and lines(path) == whole
    shutil.rmtree(folder)


def test_a_replay_leaves_it_alone(classifier_cfg, tmp_path):
    path = tmp_path / "trace.jsonl"
    cfg = classifier_cfg("mobilenet_v1_0.25", *SHORT, "DATALOADER.TRACE", str(path))
    run_in_process("plain", cfg)
    whole = lines(path)
    found = replay(Run(*finalize(cfg)), tmp_path / "run/model_0000003.pth")
    assert found["iteration"] == 4 and found["samples"] == whole[4]["ids"][0]
    with pytest.raises(ValueError, match=r"there is no iteration 6 to take again: .* SOLVER\.MAX_ITER is 6"):
        replay(Run(*finalize(cfg)), tmp_path / "run/model_final.pth")
    assert lines(path) == whole and len(whole) == 6


def test_a_file_that_is_no_trace_is_left_alone(classifier_cfg, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a trace\n")
    cfg = classifier_cfg("mobilenet_v1_0.25", *SHORT, "DATALOADER.TRACE", str(path))
    with pytest.raises(ValueError, match=r"notes.txt is no trace of samples; name another file with DATALOADER.TRACE"):
        run_in_process("plain", cfg)
    assert path.read_text() == "not a trace\n"
