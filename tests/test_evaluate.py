"""Protocols and metrics of evaluate.py (METHOD 4), on toy data worked by hand and with a tiny untrained model."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn")

import evaluate  # noqa: E402
import icas  # noqa: E402

HOME = Path(icas.__file__).parent


def record(folder, name, spots, labels, group, split="test", **more):
    """Write a 60 x 48 image with grey spots of the given values and its label map; returns the manifest's line."""
    rng = np.random.default_rng(sum(map(ord, name)))
    image, mask = rng.integers(90, 140, (48, 60, 3), dtype=np.uint8), np.zeros((48, 60), np.uint8)
    for value in spots:
        y, x = rng.integers(0, 36, 2)
        image[y:y + 9, x:x + 9], mask[y:y + 9, x:x + 9] = 255 if value == 1 else 0, value
    for kind, array in (("images", image), ("masks", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / kind / f"{name}.png")
    line = {"image": f"images/{name}.png", "labels": labels, "split": split, "group": group} | more
    return line | {"mask": f"masks/{name}.png"} if spots is not None and more.get("masked", bool(spots)) else line


@pytest.fixture
def data(tmp_path):
    """Four bright and four dark spots, six good parts; bright 0 and 1 show one item."""
    folder = tmp_path / "toy"
    lines = [record(folder, f"bright {i}", [1], {"1": "bright"}, f"b{max(i, 1)}") for i in range(4)]
    lines += [record(folder, f"dark {i}", [2], {"2": "dark"}, f"d{i}") for i in range(4)]
    lines += [record(folder, f"good {i}", [], {}, f"g{i}") for i in range(6)]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def run(*arguments, checkpoint, out):
    assert evaluate.main([*map(str, arguments), "--model", str(checkpoint), "--device", "cpu", "--out", str(out)]) == 0
    return json.loads((Path(out) / "results.json").read_text())


FIGURES = ("data", "episodes", "baselines")


def test_semantic_prompts_share_no_item_with_tests_and_every_number_is_there(checkpoint, data, tmp_path):
    result = run("--task", "semantic", "--data", data, "--seeds", 3, checkpoint=checkpoint, out=tmp_path / "out")
    groups = {f"images/bright {i}.png": f"b{max(i, 1)}" for i in range(4)} | {f"images/dark {i}.png": f"d{i}" for i in range(4)}
    for e in result["episodes"]["toy"]:
        assert {groups[n] for n in e["prompts"]}.isdisjoint(groups[n] for n in e["tests"]) and len(e["good"]) == 6
        expected = {n for n in groups if n.startswith(f"images/{e['label']}") and groups[n] not in {groups[p] for p in e["prompts"]}}
        assert set(e["tests"]) == expected
    assert len({tuple(e["prompts"]) for e in result["episodes"]["toy"]}) > 2
    row = result["data"]["toy"]["icas"]
    assert set(row["iou"]) == {"bright", "dark"} and row["mean_iou"] == pytest.approx(np.mean(list(row["iou"].values())))
    assert result["mean_iou"] == pytest.approx(row["mean_iou"]) and row["iou_with_good"] <= row["mean_iou"] + 1e-9
    assert {"nearest patch", "prototype", "nearest patch, plain"} <= set(result["baselines"])
    assert "nearest patch" in (tmp_path / "out" / "tables.txt").read_text()


@pytest.mark.parametrize("task", ["semantic", "interactive", "fewshot", "openset"])
def test_every_task_runs_draws_and_replays_the_same(checkpoint, data, tmp_path, task):
    options = {"semantic": ["--prompt", "both"], "interactive": ["--clicks", 1, 2], "fewshot": ["--shots", 1, 2], "openset": ["--normals", 2]}[task]
    first = run("--task", task, "--data", data, "--seeds", 2, *options, "--figures", tmp_path / "fig", checkpoint=checkpoint, out=tmp_path / "a")
    again = run("--replay", tmp_path / "a" / "results.json", "--batch-size", 1, checkpoint=checkpoint, out=tmp_path / "b")
    assert [first[k] for k in FIGURES] == [again[k] for k in FIGURES]
    page = (tmp_path / "fig" / "index.html").read_text()
    pictures = sorted((tmp_path / "fig").glob("*.png"))
    assert pictures and all(p.name in page for p in pictures) and "icas" in page


def test_a_normal_prompt_has_no_training_free_peer(checkpoint, data, tmp_path):
    result = run("--task", "semantic", "--data", data, "--seeds", 1, "--prompt", "normal", checkpoint=checkpoint, out=tmp_path / "out")
    said = (tmp_path / "out" / "tables.txt").read_text()
    assert {row["mean_iou"] for row in result["baselines"].values()} == {0} and "nothing to compare with" in said and "best training-free" not in said
    assert all(e["normals"] and not e["prompts"] for e in result["episodes"]["toy"])


def test_peers_see_the_prompt_as_it_lies(checkpoint, data, tmp_path):
    turned, lying = (run("--task", "semantic", "--data", data, "--seeds", 1, switch, checkpoint=checkpoint, out=tmp_path / switch)["data"]["toy"]
                     for switch in ("--turns", "--no-turns"))
    same = {m for m in evaluate.SEGMENTERS if turned[m] == lying[m]}
    assert set(evaluate.PEERS["semantic"]) <= same < set(evaluate.SEGMENTERS)
    assert lying["margin"] == lying["nearest patch"] and lying["prototypes"] == lying["prototype"]


def test_rows_of_parts_ablation_and_peers_and_the_rates_of_false_positives(checkpoint, data, tmp_path):
    few = run("--task", "fewshot", "--data", data, "--seeds", 1, "--shots", 2, "--ablation", "--figures", tmp_path / "fig", checkpoint=checkpoint,
              out=tmp_path / "few")["data"]["toy"]
    known = run("--task", "openset", "--data", data, "--seeds", 1, "--normals", 2, "--no-peers", checkpoint=checkpoint, out=tmp_path / "open")
    decoder = {"S_n", "S_n mfm", "times S_n", "times S_n mfm"}
    assert set(few) == set(evaluate.DETECTORS) - {"without the anomaly"}
    assert set(known["data"]["toy"]) == set(evaluate.DETECTORS) - decoder - set(evaluate.PEERS["openset"]) and known["baselines"] == {}
    assert set(few["icas"]["2"]) > set(few["S_n"]["2"])                       # only icas has a threshold
    for what in ("false positives", "found"):
        rates = [few["icas"]["2"][f"{what} at {rate:g}"] for rate in evaluate.RATES]
        assert rates == sorted(rates) and 0 <= rates[0] and rates[-1] <= 100
    assert (tmp_path / "fig" / "false_positives.png").is_file()
    assert "good parts that icas calls bad" in (tmp_path / "few" / "tables.txt").read_text()


def test_what_is_called_bad_is_counted_apart_on_good_and_bad_parts():
    class Records:
        records = {n: {"bad": n > "d"} for n in "abcdefg"}
    found = {("icas", n): {"score": float(i), "above": {rate: i > 5 - 10 * rate for rate in evaluate.RATES}} for i, n in enumerate("abcdefg")}
    row = evaluate.detection_metrics(found, {"tests": list("abcdefg"), "seed": 0}, Records, False)["icas"]
    assert row["image_auroc"] == 100 and [row[f"found at {r:g}"] for r in evaluate.RATES] == pytest.approx([200 / 3, 200 / 3, 200 / 3, 100], abs=0.1)
    assert [row[f"false positives at {r:g}"] for r in evaluate.RATES] == [0, 0, 0, 0]


def test_a_second_run_reads_the_finished_categories(checkpoint, data, tmp_path, monkeypatch):
    arguments = ("--task", "fewshot", "--data", data, "--seeds", 1, "--shots", 1)
    first = run(*arguments, checkpoint=checkpoint, out=tmp_path / "out")
    monkeypatch.setattr(evaluate, "run_category", None)
    assert run(*arguments, checkpoint=checkpoint, out=tmp_path / "out")["data"] == first["data"]


def test_ranks_and_listing_order_change_nothing(checkpoint, data, tmp_path):
    for task in ("semantic", "fewshot"):
        single = run("--task", task, "--data", data, "--seeds", 1, checkpoint=checkpoint, out=tmp_path / task, *(["--shots", 1] if task == "fewshot" else []))
        lines = (data / "manifest.jsonl").read_text().splitlines()
        (data / "manifest.jsonl").write_text("\n".join(np.random.default_rng(1).permutation(lines)))
        runner = "import sys, torch, icas\ntorch.set_num_threads(1)\nicas.ENCODERS['tiny14'] = (48, 4, 3)\nimport evaluate\nsys.exit(evaluate.main(sys.argv[1:]))\n"
        (tmp_path / "runner.py").write_text(runner)
        command = [sys.executable, str(tmp_path / "runner.py"), "--task", task, "--data", str(data), "--seeds", "1", "--model", str(checkpoint), "--device", "cpu",
                   "--out", str(tmp_path / f"{task}2"), "--batch-size", "8", *(["--shots", "1"] if task == "fewshot" else [])]
        base = os.environ | {"PYTHONPATH": str(HOME), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 999), "OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen(command, env=base | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
        errors = [p.communicate(timeout=120)[1] for p in ranks]
        assert [p.returncode for p in ranks] == [0, 0], errors
        double = json.loads((tmp_path / f"{task}2" / "results.json").read_text())
        assert [single[k] for k in FIGURES] == [double[k] for k in FIGURES]


def test_iou_is_pooled_over_images_and_fb_iou_over_categories():
    """Two images: 3 of 4 pixels right with 1 too many; 0 of 2 found; 100 pixels each; one good image with 5 false ones."""
    counts = {(m, n): c for m in evaluate.SEGMENTERS for n, c in (("a", [3, 5, 100]), ("b", [0, 2, 100]), ("g", [0, 5, 100]))}
    row = evaluate.iou_metrics(counts, {"tests": ["a", "b"], "good": ["g"]})["icas"]
    assert row["iou"] == pytest.approx(100 * 3 / 7) and row["image_iou"] == pytest.approx((60 + 0) / 2)
    assert row["iou_with_good"] == pytest.approx(100 * 3 / 12) and row["fb"] == [3, 7, 193, 197]
    summary = evaluate.summarise_segmentation([({"seed": 0, "label": "x", "shots": 1}, {m: row for m in evaluate.SEGMENTERS})])
    assert summary["icas"]["fb_iou"] == pytest.approx(50 * (3 / 7 + 193 / 197))


def test_pixel_auroc_and_pro_equal_their_definitions(rng):
    from scipy import ndimage
    from sklearn.metrics import roc_auc_score
    entries, maps, truths = [], [], []
    for _ in range(3):
        truth = ndimage.binary_dilation(rng.random((30, 40)) < 0.004, iterations=2)
        found = (rng.random((30, 40)) + 0.4 * truth - 0.5).astype(np.float16).astype(np.float32)
        bins = evaluate.sortable(found)
        regions, count = ndimage.label(truth, structure=np.ones((3, 3)))
        sizes = np.bincount(regions.ravel(), minlength=count + 1)
        entries.append({"bad": np.unique(bins[truth], return_counts=True), "clean": np.unique(bins[~truth], return_counts=True), "count": count,
                        "regions": (bins[truth], 1 / sizes[regions[truth]])})
        maps.append(found)
        truths.append(regions)
    got = evaluate.pixel_metrics(entries)
    flat, marked = np.concatenate([m.ravel() for m in maps]), np.concatenate([t.ravel() for t in truths]) > 0
    assert got["pixel_auroc"] == pytest.approx(100 * roc_auc_score(marked, flat))
    fpr, pro = [0.0], [0.0]
    for cut in np.unique(flat)[::-1]:
        fpr.append((flat[~marked] >= cut).mean())
        pro.append(np.mean([(m[t == i] >= cut).mean() for m, t in zip(maps, truths) for i in range(1, t.max() + 1)]))
    grid = np.linspace(0, 0.3, 20001)
    assert got["pro"] == pytest.approx(100 * np.interp(grid, fpr, pro).mean(), abs=0.05)


def test_sortable_keeps_the_order_of_signed_numbers(rng):
    values = np.sort(rng.normal(size=500)).astype(np.float16)
    assert (np.diff(evaluate.sortable(values).astype(int)) >= 0).all()


def test_clicks_fall_on_the_defect_and_beside_it():
    truth = np.zeros((20, 20), bool)
    truth[5:9, 5:9] = True
    points, signs = evaluate.clicks_on(truth, 3, 0, "a")
    assert signs == [1, 1, 1, 0, 0, 0]
    for (x, y), sign in zip(points, signs):
        assert truth[int(y), int(x)] == bool(sign) and (not sign or (6 <= x <= 7 and 6 <= y <= 7))
    assert evaluate.clicks_on(truth, 3, 0, "a") == (points, signs) != evaluate.clicks_on(truth, 3, 1, "a")


def test_the_detection_recipes_on_a_known_part_find_nothing(tiny, data):
    records = evaluate.read_source(str(data))["toy"]
    evaluate.look(records)
    store = evaluate.Store(tiny, records)
    for name, detector in evaluate.peers(tiny, store, ["images/good 0.png"]).items():
        same, other = (detector(store.tiles(f"images/good {i}.png")[0].features, f"{i}") for i in (0, 1))
        assert float(same.mean()) < 0.8 * float(other.mean()), name


def test_leaks_and_impossible_protocols_are_refused(checkpoint, data, tmp_path, capsys):
    records = evaluate.read_source(str(data))["toy"]
    evaluate.look(records)
    episode = {"seed": 0, "label": "bright", "shots": 1, "prompts": ["images/bright 0.png"], "normals": [], "tests": ["images/bright 2.png"]}
    evaluate.check([episode], records)
    for change, message in (({"tests": ["images/bright 1.png"]}, "shows the same item as a prompt"), ({"tests": []}, "no test image"),
                            ({"prompts": ["images/dark 0.png"]}, "is empty or shows another label"), ({"tests": ["images/x.png"]}, "is not in the data"),
                            ({"normals": ["images/dark 0.png"]}, "is a bad part but is given as a good one")):
        with pytest.raises(ValueError, match=message):
            evaluate.check([episode | change], records)
    lone = tmp_path / "lone"
    lines = [record(lone, "only", [1], {"1": "bright"}, "b0"), record(lone, "empty", [0], {"1": "bright"}, "b1", masked=True)]
    (lone / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    base = ["--model", str(checkpoint), "--device", "cpu", "--out", str(tmp_path / "out"), "--data", str(lone), "--task"]
    assert evaluate.main([*base, "semantic"]) == 2
    error = capsys.readouterr().err
    assert "1 masks are empty: counted as good" in error and "marked in two images of different items" in error
    (lone / "manifest.jsonl").write_text(json.dumps(lines[0]))
    assert evaluate.main([*base, "fewshot"]) == 2
    assert "AUROC is undefined" in capsys.readouterr().err
    assert evaluate.main([*base[:-3], "--data", str(tmp_path / "nowhere"), "--task", "semantic"]) == 2
    assert "no manifest or folder" in capsys.readouterr().err


def test_strips_cut_the_longer_side_and_folders_need_no_manifest(tmp_path):
    rng = np.random.default_rng(0)
    for kind, count in (("good", 2), ("bad", 1)):
        (tmp_path / "mine" / kind).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (90, 30), dtype=np.uint8)).save(tmp_path / "mine" / kind / f"{i}.png")
    mask = np.zeros((90, 30), np.uint8)
    mask[40:50, 5:9] = 255
    (tmp_path / "mine" / "mask").mkdir()
    Image.fromarray(mask).save(tmp_path / "mine" / "mask" / "0.png")
    records = evaluate.read_source(str(tmp_path / "mine"), strips=3)["mine"]
    evaluate.look(records)
    assert len(records) == 9 and [r["shows"] for r in records if r["bad"]] == [{"defect": 1}]
    bad = next(r for r in records if r["bad"])
    image, labels = evaluate.read_record(bad)
    assert tuple(image.shape) == (3, 30, 30) and int((labels > 0).sum()) == 40 and bad["name"].endswith("#1")
