"""The shipped checkpoint and the README, as a user meets them."""
import ast
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import icas

ROOT = Path(__file__).parents[1]
ENCODER = ROOT / "checkpoints" / "vits14-saliency.safetensors"
pytestmark = pytest.mark.skipif(not (ROOT / "checkpoints" / icas.CHECKPOINT).is_file(),
                                reason="no checkpoints/ beside the tests")


@pytest.fixture(scope="module")
def cells():
    load_dataset = pytest.importorskip("elpv_dataset.utils").load_dataset
    return load_dataset()[0]


@pytest.fixture(scope="module")
def prompt_mask():
    from PIL import Image, ImageDraw
    canvas = Image.new("L", (300, 300))
    ImageDraw.Draw(canvas).polygon(icas.DEMO_PROMPT[1], fill=255)
    return np.array(canvas) > 0


@pytest.fixture
def folder(tmp_path, cells, prompt_mask, monkeypatch):
    """The files that the README's examples name."""
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    names = {"scratched": icas.DEMO_PROMPT[0], "part": 6, "part_1": 6, "part_2": 368, "good_1": 3,
             "good_2": 8, "parts/a": 6, "parts/b": 368, "good/a": 3, "good/b": 8,
             **{f"parts/{i}": i for i in (59, 446, 499, 503)}}
    for name, index in names.items():
        Path(f"{name}.png").parent.mkdir(exist_ok=True)
        Image.fromarray(cells[index]).save(f"{name}.png")
    Image.fromarray(prompt_mask).save("scratched_mask.png")
    return tmp_path


def readme_blocks(language: str) -> list[str]:
    """Fenced blocks of the README whose opening fence names `language`."""
    fenced = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
    parts = (block.partition("\n") for block in fenced)
    return [text for name, _, text in parts if name == language]


def test_one_outlined_dark_area_marks_the_dark_area_of_another_cell(cells, prompt_mask):
    found = icas.segment(cells[6], anomalies=[(cells[icas.DEMO_PROMPT[0]], prompt_mask)])
    dark = cells[6] < 30  # by eye: the area is the only part of the cell that is nearly black
    overlap = (found.mask & dark).sum() / (found.mask | dark).sum()
    assert overlap > 0.6, overlap


def test_a_good_cell_scores_below_a_broken_one(cells):
    good = icas.encode(normals=[cells[i] for i in icas.DEMO_GOOD])
    scores = [r.score for r in icas.detect([cells[i] for i in (17, 21, 368, 396)], good)]
    assert min(scores[:2]) > max(scores[2:])


def test_a_click_marks_the_area_under_it(cells):
    assert icas.segment(cells[6], points=[(80, 122)]).mask[122, 80]


def test_the_encoder_that_ships_is_the_one_of_the_record():
    found = "52cc6ece26324d17d7af1c45ef24cf942ae33d6acff53dac0bf870ddef203dc2"
    assert icas.sha256(ENCODER) == found == icas.load().encoder_sha256
    assert icas.find_shipped(icas.CHECKPOINT).stat().st_size < 36e6


def test_naming_the_encoder_that_ships_brings_the_decoder_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = icas.load(encoder=ENCODER)
    assert model.decoder is not None and model.config == icas.load().config


def test_bf16_masks_differ_from_float32_in_few_pixels(cells, prompt_mask, monkeypatch):
    shot, masks = [(cells[icas.DEMO_PROMPT[0]], prompt_mask)], []
    for fast in (True, False):  # each with bases of its own
        monkeypatch.setattr(icas, "fast_bf16", lambda device: fast)  # noqa: B023
        model = icas.load()
        prompt = icas.encode(shot, turns=False, model=model)
        masks.append(icas.segment(cells[6], prompt, model=model).mask)
    assert (masks[0] & masks[1]).sum() > 0.95 * (masks[0] | masks[1]).sum() > 0


def test_nothing_needs_more_than_the_python_that_the_readme_names():
    """`x[:, *y]` is of Python 3.11; other news of the language are refused by the compiler."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("data_prep/*.py")):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 10))):
            index = getattr(getattr(node, "slice", None), "elts", [])
            assert not any(isinstance(x, ast.Starred) for x in index), ast.unparse(node)


@pytest.mark.parametrize("block", readme_blocks("python"))
def test_the_readme_s_python_runs_as_printed(block, folder, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_readme_s_commands_run_as_printed(folder):
    lines = [line for block in readme_blocks("") for line in block.splitlines()]
    commands = [line.split("#")[0] for line in lines if line.startswith("icas ")]
    assert len(commands) == 5 and readme_blocks("python")   # or nothing is tested above
    for command in commands:
        assert icas.main(shlex.split(command)[1:]) == 0, command
    assert json.loads((folder / "found" / "coco.json").read_text())["annotations"]


# VmHWM is the peak of this process alone; ru_maxrss begins with that of the one that started it
MEASURE = """
import sys
import icas
status = icas.main(sys.argv[1:])
print("peak in kilobytes:", next(x for x in open("/proc/self/status") if "VmHWM" in x).split()[1])
sys.exit(status)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_large_picture_marked_all_over_takes_less_than_one_and_a_half_gigabytes(folder, cells):
    from PIL import Image
    size = 8000, 6000
    Image.fromarray(cells[6]).resize(size, Image.Resampling.NEAREST).save("large.jpg", quality=50)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, "segment", "large.jpg", "--anomaly", "scratched.png",
         "scratched_mask.png", "--no-turns", "--threshold", "0", "--out", "large", "--device",
         "cpu"], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split("kilobytes:")[1]) * 1024 < 1.5e9, run.stdout
    line = json.loads((folder / "large" / "results.jsonl").read_text())
    assert (line["width"], line["height"]) == size
    mask = Image.open(folder / "large" / line["mask"])
    assert mask.size == size and line["area"] == np.count_nonzero(mask)
    with Image.open(folder / "large" / line["overlay"]) as overlay:   # for the eye: reduced
        w, h = overlay.size
    assert w * h <= 2e6 and w / h == pytest.approx(4 / 3, rel=0.1)


def test_the_demo_runs_both_commands_on_files_that_it_writes(tiny, tmp_path, cells, capsys,
                                                            monkeypatch):
    monkeypatch.setattr(icas, "load", lambda *a, **k: tiny)
    assert icas.main(["demo", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for task in ("detect", "segment"):
        out = tmp_path / "demo" / task
        assert f"$ icas {task} {tmp_path / 'demo' / 'cells'}" in said
        found = (out / "results.jsonl").read_text().splitlines()
        assert len(found) == len(icas.DEMO_CELLS) and (out / "report.html").is_file()
        assert out.with_suffix(".png").is_file()


def test_speed_is_measured_beside_the_encoder_s_own(tmp_path):
    import evaluate
    assert evaluate.main(["--task", "speed", "--no-sam", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["ratio"] > 1 and record["parameters"]["encoder"] == 22_056_192


def test_training_and_evaluation_run_from_a_manifest(tmp_path, cells, prompt_mask):
    import evaluate
    import train
    from PIL import Image
    data = tmp_path / "cells"
    (data / "masks").mkdir(parents=True)
    records = []
    for i in range(4):
        Image.fromarray(np.roll(cells[icas.DEMO_PROMPT[0]], 9 * i, axis=1)).save(data / f"{i}.png")
        mask = np.roll(prompt_mask, 9 * i, axis=1).astype(np.uint8)
        Image.fromarray(mask).save(data / "masks" / f"{i}.png")
        records.append({"image": f"{i}.png", "mask": f"masks/{i}.png", "labels": {"1": "dark"},
                        "split": "train", "group": str(i)})
    (data / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "run"
    shape = ["--image-size", "112", "--queries", "8", "--dim", "32", "--layers", "1", "--ffn-dim",
             "32", "--pixel-dim", "8"]
    assert train.main(["--stage", "anomaly", "--data", str(data), "--out", str(out), "--steps", "2",
                       "--batch-size", "2", "--synthetic", "3", "--encoder", str(ENCODER),
                       *shape]) == 0
    trained = icas.load(out / "last.safetensors", encoder=ENCODER)
    assert trained.config.dim == 32
    assert evaluate.main(["--task", "semantic", "--data", str(data), "--seeds", "1", "--out",
                          str(tmp_path / "eval")]) == 0
    result = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert result["mean_iou"] > 50 and {"nearest patch", "prototype"} < set(result["baselines"])
    for episode in result["episodes"]["cells"]:
        assert not set(episode["prompts"]) & set(episode["tests"])
