"""Protocols and metrics of evaluate.py, on toy data worked by hand and a tiny untrained model."""
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
from data_prep import episodes  # noqa: E402
from data_prep.manifest import read_record  # noqa: E402
from data_prep.peers import detection_peers  # noqa: E402

HOME = Path(icas.__file__).parent


def record(folder, name, spots, labels, group, split="test", **more):
    """Write a 60 x 48 image with grey spots of the given values, and its label map; returns the
    manifest's line."""
    rng = np.random.default_rng(sum(map(ord, name)))
    image = rng.integers(90, 140, (48, 60, 3), dtype=np.uint8)
    mask = np.zeros((48, 60), np.uint8)
    for value in spots:
        y, x = rng.integers(0, 36, 2)
        image[y:y + 9, x:x + 9], mask[y:y + 9, x:x + 9] = 255 if value == 1 else 0, value
    for kind, array in (("images", image), ("masks", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / kind / f"{name}.png")
    line = {"image": f"images/{name}.png", "labels": labels, "split": split, "group": group} | more
    return line | {"mask": f"masks/{name}.png"} if more.get("masked", bool(spots)) else line


def write_manifest(folder, lines):
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def data(tmp_path):
    """Four bright and four dark spots, six good parts; bright 0 and 1 show one item."""
    folder = tmp_path / "toy"
    lines = [record(folder, f"bright {i}", [1], {"1": "bright"}, f"b{max(i, 1)}") for i in range(4)]
    lines += [record(folder, f"dark {i}", [2], {"2": "dark"}, f"d{i}") for i in range(4)]
    lines += [record(folder, f"good {i}", [], {}, f"g{i}") for i in range(6)]
    write_manifest(folder, lines)
    return folder


def run(*arguments, checkpoint, out):
    assert evaluate.main([*map(str, arguments), "--model", str(checkpoint), "--device", "cpu",
                          "--out", str(out)]) == 0
    return json.loads((Path(out) / "results.json").read_text())


FIGURES = ("data", "episodes", "baselines")


def test_semantic_prompts_share_no_item_with_tests_and_every_number_is_there(checkpoint, data,
                                                                             tmp_path):
    result = run("--task", "semantic", "--data", data, "--seeds", 3, checkpoint=checkpoint,
                 out=tmp_path / "out")
    groups = {f"images/bright {i}.png": f"b{max(i, 1)}" for i in range(4)}
    groups |= {f"images/dark {i}.png": f"d{i}" for i in range(4)}
    for e in result["episodes"]["toy"]:
        shown = {groups[n] for n in e["prompts"]}
        assert shown.isdisjoint(groups[n] for n in e["tests"]) and len(e["good"]) == 6
        assert set(e["tests"]) == {n for n in groups if n.startswith(f"images/{e['label']}")
                                   and groups[n] not in shown}
    assert len({tuple(e["prompts"]) for e in result["episodes"]["toy"]}) > 2
    row = result["data"]["toy"]["icas"]
    assert set(row["iou"]) == {"bright", "dark"}
    assert row["mean_iou"] == pytest.approx(np.mean(list(row["iou"].values())))
    assert len(row["seeds"]) == 3 and row["std"] == pytest.approx(np.std(row["seeds"]))
    assert result["mean_iou"] == pytest.approx(row["mean_iou"])
    assert row["iou_with_good"] <= row["mean_iou"] + 1e-9 and 0 < row["ap"] <= 100
    assert set(evaluate.PEERS[:4]) == set(result["baselines"])
    assert "nearest patch" in (tmp_path / "out" / "tables.txt").read_text()


@pytest.mark.parametrize("task, options", [
    ("semantic", ["--prompt", "both"]), ("interactive", ["--clicks", 1, 2]),
    ("fewshot", ["--shots", 1, 2]), ("openset", ["--normals", 2])])
def test_every_task_runs_draws_and_replays_the_same(checkpoint, data, tmp_path, task, options):
    first = run("--task", task, "--data", data, "--seeds", 2, *options, "--figures",
                tmp_path / "fig", checkpoint=checkpoint, out=tmp_path / "a")
    again = run("--replay", tmp_path / "a" / "results.json", checkpoint=checkpoint,
                out=tmp_path / "b")
    assert [first[k] for k in FIGURES] == [again[k] for k in FIGURES]
    page = (tmp_path / "fig" / "index.html").read_text()
    pictures = sorted((tmp_path / "fig").glob("*.png"))
    assert len(pictures) == sum(e["seed"] == 0 for e in first["episodes"]["toy"])
    assert all(p.name in page for p in pictures) and "icas" in page


def test_a_run_that_was_stopped_goes_on_after_its_last_finished_episode(
        checkpoint, data, tmp_path, monkeypatch, capsys):
    command = ["--task", "semantic", "--data", data, "--seeds", 2]
    whole = run(*command, checkpoint=checkpoint, out=tmp_path / "whole")
    scored, score = [], evaluate.score

    def stopped(*a, **k):
        scored.append(a)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(*a, **k)
    monkeypatch.setattr(evaluate, "score", stopped)
    try:
        run(*command, checkpoint=checkpoint, out=tmp_path / "out")
    except (KeyboardInterrupt, AssertionError):
        pass
    log, = (tmp_path / "out" / "parts").glob("*.jsonl")
    kept = log.read_text()
    assert len(kept.splitlines()) == 2
    log.write_text(kept + "\n" + kept[:40])   # killed while it wrote
    assert run(*command, checkpoint=checkpoint, out=tmp_path / "out")["data"] == whole["data"]
    assert len(scored) == 3 + len(whole["episodes"]["toy"]) - 2
    assert list((tmp_path / "out" / "parts").glob("*")) == [log]   # nothing is left beside it


def test_detection_encodes_each_image_once_for_all_its_episodes(checkpoint, data, tmp_path,
                                                                monkeypatch):
    seen, encode_image = [], icas.encode_image

    def counted(image, *a, **k):
        seen.append(image.tobytes() if isinstance(image, np.ndarray) else "")
        return encode_image(image, *a, **k)
    monkeypatch.setattr(icas, "encode_image", counted)
    command = ["--data", data, "--task", "fewshot", "--seeds", 2, "--shots", 1, 2]
    result = run(*command, "--no-peers", checkpoint=checkpoint, out=tmp_path / "out")
    pictures = [x for x in seen if x]   # not those that `detect` got encoded
    tests = {n for e in result["episodes"]["toy"] for n in e["tests"]}
    assert len(pictures) == len(set(pictures)) == len(tests)
    apart = []
    for e in result["episodes"]["toy"]:
        single = only(tmp_path / "out" / "results.json", e)
        apart.append(run("--replay", single, "--no-peers", checkpoint=checkpoint,
                         out=tmp_path / f"{e['seed']}{e['shots']}")["data"]["toy"]["icas"])
    row = result["data"]["toy"]["icas"]
    for shots in ("1", "2"):
        aps = [x[shots]["ap"] for x in apart if shots in x]
        assert row[shots]["ap"] == pytest.approx(np.mean(aps))


def test_progress_and_the_time_left_are_shown(checkpoint, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = run("--task", "semantic", "--data", data, "--seeds", 2, checkpoint=checkpoint,
                 out=tmp_path / "out")
    count, said = len(result["episodes"]["toy"]), capsys.readouterr().err
    assert "semantic-toy" in said and f"{count}/{count} [" in said


def test_a_normal_prompt_has_no_training_free_peer(checkpoint, data, tmp_path):
    result = run("--task", "semantic", "--data", data, "--seeds", 1, "--prompt", "normal",
                 checkpoint=checkpoint, out=tmp_path / "out")
    assert result["baselines"] == {} and result["mean_iou"] >= 0
    assert not set(evaluate.PEERS) & set(result["data"]["toy"])
    assert all(e["normals"] and not e["prompts"] for e in result["episodes"]["toy"])


def test_peers_see_the_prompt_as_it_lies(checkpoint, data, tmp_path):
    turned, lying = (run("--task", "semantic", "--data", data, "--seeds", 1, switch,
                         checkpoint=checkpoint, out=tmp_path / switch)["data"]["toy"]
                     for switch in ("--turns", "--no-turns"))
    same = {method for method in lying if turned[method] == lying[method]}
    assert set(evaluate.PEERS[:4]) <= same and "icas" not in same and set(turned) == set(lying)
    matching = {m for m in lying if m.startswith("block 3")}
    assert len(matching) == 2 and not matching & same


def test_rows_of_parts_and_peers_and_the_rates_of_false_positives(checkpoint, data, tmp_path):
    few = run("--task", "fewshot", "--data", data, "--seeds", 1, "--shots", 2,
              checkpoint=checkpoint, out=tmp_path / "few")["data"]["toy"]
    known = run("--task", "openset", "--data", data, "--seeds", 1, "--normals", 2, "--no-peers",
                checkpoint=checkpoint, out=tmp_path / "open")
    parts = {"icas", "block 2", "block 3", "block 4", "detail", "fine detail"}
    assert set(few) == parts | set(evaluate.PEERS[4:])
    assert set(known["data"]["toy"]) == parts and known["baselines"] == {}
    assert set(known["data"]["toy"]["icas"]) == {"general", "hard"}
    assert set(few["icas"]["2"]) > set(few["block 3"]["2"])         # only icas has a threshold
    assert {"pixel_auroc", "pro", "ap"} < set(few["AnomalyDINO recipe"]["2"])
    for what in ("false positives", "found"):
        rates = [few["icas"]["2"][f"{what} at {rate:g}"] for rate in evaluate.RATES]
        assert rates == sorted(rates) and 0 <= rates[0] and rates[-1] <= 100
    assert "false positives at 0.01" in (tmp_path / "few" / "tables.txt").read_text()


def test_numbers_of_good_parts_with_peers_and_without_are_measured_in_one_run(checkpoint, data,
                                                                              tmp_path):
    rows = run("--task", "fewshot", "--data", data, "--seeds", 1, "--shots", 0, 2,
               checkpoint=checkpoint, out=tmp_path / "few")["data"]["toy"]
    assert set(rows["icas"]) == {"0", "2"} and set(rows["AnomalyDINO recipe"]) == {"2"}


def test_what_is_called_bad_is_counted_apart_on_good_and_bad_parts():
    records = {n: {"bad": n > "d"} for n in "abcdefg"}
    found = {"icas": {"images": {n: float(i) for i, n in enumerate("abcdefg")},
                      "cuts": {rate: 5 - 10 * rate for rate in evaluate.RATES},
                      "bins": np.zeros((3, 1 << 16))}}
    row = evaluate.metrics(found, {"tests": list("abcdefg"), "seed": 0}, records)["icas"]
    assert row["image_auroc"] == row["aupr"] == row["f1_max"] == 100
    assert [row[f"found at {r:g}"] for r in evaluate.RATES] == pytest.approx(
        [200 / 3, 200 / 3, 200 / 3, 100])
    assert [row[f"false positives at {r:g}"] for r in evaluate.RATES] == [0, 0, 0, 0]


def test_a_second_run_reads_the_finished_categories(checkpoint, data, tmp_path, monkeypatch):
    arguments = ("--task", "fewshot", "--data", data, "--seeds", 1, "--shots", 1)
    first = run(*arguments, checkpoint=checkpoint, out=tmp_path / "out")
    monkeypatch.setattr(evaluate, "score", None)
    again = run(*arguments, checkpoint=checkpoint, out=tmp_path / "out")
    assert again["data"] == first["data"]
    with pytest.raises(TypeError, match="not callable"):   # other arguments, another part
        evaluate.run(evaluate.parser().parse_args([
            *map(str, arguments), "--no-peers", "--model", str(checkpoint), "--device", "cpu",
            "--out", str(tmp_path / "out")]))


RUNNER = """import sys, torch, icas
torch.set_num_threads(1)
icas.ENCODERS['tiny14'] = (48, 4, 3)
icas.DETAIL = {detail!r}
import evaluate
sys.exit(evaluate.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("task, more", [("semantic", []), ("fewshot", ["--shots", "1"])])
def test_ranks_and_listing_order_change_nothing(checkpoint, data, tmp_path, task, more):
    single = run("--task", task, "--data", data, "--seeds", 1, *more, checkpoint=checkpoint,
                 out=tmp_path / task)
    lines = (data / "manifest.jsonl").read_text().splitlines()
    (data / "manifest.jsonl").write_text("\n".join(np.random.default_rng(1).permutation(lines)))
    (tmp_path / "runner.py").write_text(RUNNER.format(detail=icas.DETAIL))
    command = [sys.executable, str(tmp_path / "runner.py"), "--task", task, "--data", str(data),
               "--seeds", "1", "--model", str(checkpoint), "--device", "cpu",
               "--out", str(tmp_path / f"{task}2"), *more]
    base = os.environ | {"PYTHONPATH": str(HOME), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                         "MASTER_PORT": str(29500 + os.getpid() % 999), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen(command, env=base | {"RANK": str(r), "LOCAL_RANK": str(r)},
                              stderr=subprocess.PIPE, text=True) for r in range(2)]
    errors = [p.communicate(timeout=120)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], errors
    double = json.loads((tmp_path / f"{task}2" / "results.json").read_text())
    assert [single[k] for k in FIGURES] == [double[k] for k in FIGURES]


def test_iou_is_pooled_over_images_and_fb_iou_over_categories():
    """Two images of 100 pixels: 3 of 4 right with 1 too many; 0 of 2 found; a good image with 5
    false ones."""
    images = {"a": [3, 5, 100], "b": [0, 2, 100], "g": [0, 5, 100]}
    found = {"icas": {"images": images, "bins": np.zeros((3, 1 << 16))}}
    episode = {"seed": 0, "label": "x", "shots": 1, "tests": ["a", "b"], "good": ["g"]}
    row = evaluate.metrics(found, episode, {})["icas"]
    assert row["iou"] == pytest.approx(100 * 3 / 7)
    assert row["image_iou"] == pytest.approx((60 + 0) / 2)
    assert row["iou_with_good"] == pytest.approx(100 * 3 / 12) and row["fb"] == [3, 7, 193, 197]
    other = {"iou": 10.0, "iou_with_good": 10.0, "image_iou": 10.0, "fb": [1, 3, 7, 197]}
    summary = evaluate.summarise([(episode, {"icas": row}), (episode | {"label": "y", "seed": 1},
                                                             {"icas": other})])["icas"]
    assert summary["fb_iou"] == pytest.approx(50 * (4 / 10 + 200 / 394))
    assert summary["iou"] == pytest.approx({"x": 300 / 7, "y": 10})
    assert summary["std"] == pytest.approx((300 / 7 - 10) / 2)
    assert summary["shots"] == pytest.approx({"1": (300 / 7 + 10) / 2})


def test_what_some_episodes_lack_is_summarised_over_the_others():
    episode = {"seed": 0, "label": "x", "shots": 1, "tests": ["a"]}
    row = {"iou": 10.0, "iou_with_good": 10.0, "image_iou": 10.0, "fb": [1, 3, 7, 197]}
    scored = [(episode, {"icas": row}), (episode | {"label": "y"}, {"icas": row, "novelty": row})]
    for found in (evaluate.summarise(scored), evaluate.summarise(scored[::-1])):
        assert set(found["icas"]["iou"]) == {"x", "y"} and found["novelty"]["iou"] == {"y": 10.0}


def test_pixel_metrics_equal_their_definitions(rng):
    from scipy import ndimage
    from sklearn.metrics import average_precision_score, roc_auc_score
    bins, maps, truths = 0, [], []
    for _ in range(3):
        truth = ndimage.binary_dilation(rng.random((30, 40)) < 0.004, iterations=2)
        found = (rng.random((30, 40)) + 0.4 * truth - 0.5).astype(np.float16).astype(np.float32)
        found[:3] = -0.0   # ties, and a zero of either sign
        found[3] = 0.0
        bins = bins + evaluate.pixel_bins(found, truth)
        maps.append(found)
        truths.append(ndimage.label(truth, structure=np.ones((3, 3)))[0])
    got = evaluate.pixel_metrics(bins)
    flat = np.concatenate([m.ravel() for m in maps])
    marked = np.concatenate([t.ravel() for t in truths]) > 0
    assert got["ap"] == pytest.approx(100 * average_precision_score(marked, flat), rel=1e-12)
    assert got["pixel_auroc"] == pytest.approx(100 * roc_auc_score(marked, flat), rel=1e-12)
    fpr, pro = [0.0], [0.0]
    for cut in np.unique(flat)[::-1]:
        fpr.append((flat[~marked] >= cut).mean())
        pro.append(np.mean([(m[t == i] >= cut).mean() for m, t in zip(maps, truths)
                            for i in range(1, t.max() + 1)]))
    grid = np.linspace(0, 0.3, 20001)
    assert got["pro"] == pytest.approx(100 * np.interp(grid, fpr, pro).mean(), abs=0.05)
    assert evaluate.pixel_metrics(evaluate.pixel_bins(maps[0], np.zeros((30, 40), bool))) == {}


def test_sortable_keeps_the_order_of_signed_numbers(rng):
    values = np.sort(rng.normal(size=500)).astype(np.float16)
    order = np.diff(evaluate.sortable(values).astype(int))
    assert (order >= 0).all() and ((order > 0) == (np.diff(values) > 0)).all()


def test_clicks_fall_on_the_defect_and_beside_it():
    truth = np.zeros((20, 20), bool)
    truth[5:9, 5:9] = True
    points, signs = episodes.clicks_on(truth, 3, 0, "a")
    assert signs == [1, 1, 1, 0, 0, 0]
    for (x, y), sign in zip(points, signs):
        assert truth[int(y), int(x)] == bool(sign)
        assert not sign or (6 <= x <= 7 and 6 <= y <= 7)
    assert episodes.clicks_on(truth, 3, 0, "a") == (points, signs)
    assert episodes.clicks_on(truth, 3, 1, "a") != (points, signs)


def test_the_detection_recipes_on_a_known_part_find_nothing(tiny, data):
    store = evaluate.Store(tiny, evaluate.read_sources([str(data)])["toy"])
    novelty = detection_peers(store, ["images/good 0.png"])
    same, other = (novelty(f"images/good {i}.png") for i in (0, 1))
    assert list(same) == list(evaluate.PEERS[4:])
    for name in same:
        assert float(same[name].mean()) < 0.8 * float(other[name].mean()), name


def test_figures_are_those_of_segment_and_detect_by_hand(checkpoint, data, tmp_path):
    from sklearn.metrics import average_precision_score, roc_auc_score
    model = icas.load(checkpoint, device="cpu")

    def image(name):
        return np.array(Image.open(data / name))

    def mask(name):
        return np.array(Image.open(data / name.replace("images", "masks"))) > 0
    result = run("--task", "semantic", "--data", data, "--seeds", 1, checkpoint=checkpoint,
                 out=tmp_path / "seg")
    e = next(e for e in result["episodes"]["toy"] if e["label"] == "dark")
    shown = icas.encode([(image(n), mask(n)) for n in e["prompts"]], model=model)
    found = {n: icas.segment(image(n), shown, parts=True, model=model)
             for n in e["tests"] + e["good"]}
    both, either = (sum(int(f(found[n].mask, mask(n)).sum()) for n in e["tests"])
                    for f in (np.logical_and, np.logical_or))
    row = result["data"]["toy"]["icas"]
    assert row["iou"]["dark"] == pytest.approx(100 * both / either)
    odds = np.concatenate([found[n].parts["icas"].astype(np.float16).ravel() for n in e["tests"]])
    ap = 100 * average_precision_score(np.concatenate([mask(n).ravel() for n in e["tests"]]), odds)
    false = sum(int(found[n].mask.sum()) for n in e["good"])
    alone = run("--replay", only(tmp_path / "seg" / "results.json", e), checkpoint=checkpoint,
                out=tmp_path / "one")["data"]["toy"]["icas"]
    assert alone["ap"] == pytest.approx(ap)
    assert alone["iou_with_good"] == pytest.approx(100 * both / (either + false))

    result = run("--task", "fewshot", "--data", data, "--seeds", 1, "--shots", 2, "--no-peers",
                 checkpoint=checkpoint, out=tmp_path / "few")
    e, = result["episodes"]["toy"]
    normals = [image(n) for n in e["normals"]]
    found = [icas.detect(image(n), normals=normals, false_positive_rate=0.2, model=model)
             for n in e["tests"]]
    bad = np.array(["good" not in n for n in e["tests"]])
    row = result["data"]["toy"]["icas"]["2"]
    assert row["image_auroc"] == pytest.approx(100 * roc_auc_score(bad, [r.score for r in found]))
    called = np.array([r.is_anomalous for r in found])
    assert row["false positives at 0.2"] == pytest.approx(100 * called[~bad].mean())
    assert row["found at 0.2"] == pytest.approx(100 * called[bad].mean())
    maps = np.concatenate([r.map.astype(np.float16).ravel() for r in found])
    marked = np.concatenate([mask(n).ravel() for n in e["tests"]])
    assert row["pixel_auroc"] == pytest.approx(100 * roc_auc_score(marked, maps))


def only(path, episode):
    """A copy of a results.json with one episode."""
    record = json.loads(path.read_text())
    record["episodes"] = {"toy": [episode]}
    path.with_name("only.json").write_text(json.dumps(record))
    return path.with_name("only.json")


def test_the_development_table_reads_dev_and_train_and_never_test(checkpoint, tmp_path):
    for name, split, good in (("a", "dev", 12), ("b", "dev", 0), ("c", "train", 3),
                              ("d", "test", 2)):
        lines = [record(tmp_path / name, f"{name} {i}", [1], {"1": "spot"}, f"{name}{i}", split)
                 for i in range(4)]
        lines += [record(tmp_path / name, f"{name} good {i}", [], {}, f"{name}g{i}", split)
                  for i in range(good)]
        write_manifest(tmp_path / name, lines)
    for file in (tmp_path / "d").glob("*/*.png"):
        file.write_bytes(b"a test picture is not looked at")
    result = run("--task", "development", "--data", *(tmp_path / n for n in "abcd"),
                 checkpoint=checkpoint, out=tmp_path / "out")
    rows, keys = result["development"], {"mean_iou", "mean_iou_with_good", "ap", "image_auroc"}
    assert {"icas", "S_s", "block 3 nearest", "detail"} | set(evaluate.PEERS[:4]) < set(rows)
    assert not set(evaluate.PEERS[4:]) & set(rows)
    for row in rows.values():
        assert set(row) == keys | {"sets"} and set(row["image_auroc"]) == {"1", "4", "8"}
        assert all(set(figures) == keys and set(figures["image_auroc"]) == {"1", "4", "8"}
                   for figures in row["sets"].values())
    row = rows["icas"]
    sets = row["sets"]
    assert set(sets) == {"a", "b", "c"} and set(rows["prototype"]["sets"]) == {"a", "b"}
    for key in ("mean_iou", "mean_iou_with_good", "ap"):
        assert all(0 <= sets[n][key] <= 100 for n in sets)
        assert row[key] == pytest.approx((sets["a"][key] + sets["b"][key]) / 2)
    assert sets["b"]["mean_iou_with_good"] == sets["b"]["mean_iou"]
    assert all(x["mean_iou_with_good"] <= x["mean_iou"] for x in (
        rows[m]["sets"]["a"] for m in rows if "nearest" in m or "Fisher" in m))
    assert row["image_auroc"] == sets["a"]["image_auroc"]
    assert all(0 <= v <= 100 for v in row["image_auroc"].values())
    assert set(sets["b"]["image_auroc"].values()) == {None}
    detection = [e for e in result["episodes"]["a"] if "label" not in e]
    assert [(e["seed"], e["shots"]) for e in detection] == [(s, k) for s in range(5)
                                                            for k in (1, 4, 8)]
    assert "icas" in (tmp_path / "out" / "tables.txt").read_text()
    assert evaluate.main(["--task", "development", "--data", str(tmp_path / "d"), "--model",
                          str(checkpoint), "--device", "cpu", "--out", str(tmp_path / "e")]) == 2


def test_training_sets_of_the_development_table_are_capped(tmp_path):
    lines = [record(tmp_path / "t", f"{k} {i}", [k], {str(k): f"kind {k}"}, f"{k}{i}", "train")
             for k in range(1, 6) for i in range(30)]
    lines += [record(tmp_path / "t", f"good {i}", [], {}, f"g{i}", "train") for i in range(30)]
    write_manifest(tmp_path / "t", lines)
    records = episodes.read_source(str(tmp_path / "t"))["t"]
    planned = episodes.plan("development", records)
    assert [e["label"] for e in planned] == ["kind 1", "kind 2", "kind 3"]
    assert all(6 < len(e[k]) <= 12 and e["peers"] is False for e in planned
               for k in ("tests", "good"))
    episodes.check(planned, records)


def test_folders_in_the_mvtec_layout_with_another_encoder(checkpoint, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("screw", "transistor"):
        for kind, count in (("train/good", 2), ("test/good", 2), ("test/bent", 2)):
            (tmp_path / name / kind).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(90, 140, (40, 40, 3), dtype=np.uint8)
                image[5:15, 5:15] = 255 if "bent" in kind else image[5:15, 5:15]
                Image.fromarray(image).save(tmp_path / name / kind / f"{i:03}.png")
        (tmp_path / name / "ground_truth" / "bent").mkdir(parents=True)
        mask = np.zeros((40, 40), np.uint8)
        mask[5:15, 5:15] = 255
        for i in range(2):
            Image.fromarray(mask).save(tmp_path / name / f"ground_truth/bent/{i:03}_mask.png")
    assert evaluate.main([
        "--task", "fewshot", "--data", str(tmp_path / "screw"), str(tmp_path / "transistor"),
        "--shots", "1", "--seeds", "1", "--encoder",
        str(checkpoint.parent / "encoder.safetensors"), "--config", "image_size=112",
        "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(result["data"]) == {"screw", "transistor"}
    assert {"AnomalyDINO recipe", "SubspaceAD recipe"} == set(result["baselines"])
    aurocs = [result["data"][n]["icas"]["1"]["image_auroc"] for n in result["data"]]
    assert result["image_auroc"]["1"] == pytest.approx(np.mean(aurocs))
    assert "pro" in result["data"]["screw"]["icas"]["1"]


def test_leaks_and_impossible_protocols_are_refused(checkpoint, data, tmp_path, capsys):
    records = episodes.read_source(str(data))["toy"]
    episode = {"seed": 0, "label": "bright", "shots": 1, "prompts": ["images/bright 0.png"],
               "normals": [], "tests": ["images/bright 2.png"]}
    episodes.check([episode], records)
    for change, message in (
            ({"tests": ["images/bright 1.png"]}, "shows the same item as a prompt"),
            ({"tests": []}, "no test image"),
            ({"prompts": ["images/dark 0.png"]}, "is empty or shows another label"),
            ({"tests": ["images/x.png"]}, "is not in the data"),
            ({"normals": ["images/dark 0.png"]}, "is a bad part but is given as a good one"),
            ({"setting": "hard"}, "all tests are bad: AUROC is undefined")):
        with pytest.raises(ValueError, match=message):
            episodes.check([episode | change], records)
    lone = tmp_path / "lone"
    lines = [record(lone, "only", [1], {"1": "bright"}, "b0"),
             record(lone, "empty", [0], {"1": "bright"}, "b1", masked=True)]
    write_manifest(lone, lines)
    base = ["--model", str(checkpoint), "--device", "cpu", "--out", str(tmp_path / "out"),
            "--data", str(lone), "--task"]
    assert evaluate.main([*base, "semantic"]) == 2
    error = capsys.readouterr().err
    assert "1 masks are empty: counted as good" in error
    assert "marked in two images of different items" in error
    write_manifest(lone, lines[:1])
    assert evaluate.main([*base, "fewshot"]) == 2
    assert "AUROC is undefined" in capsys.readouterr().err
    nowhere = str(tmp_path / "nowhere")
    assert evaluate.main([*base[:-3], "--data", nowhere, "--task", "semantic"]) == 2
    assert "no manifest or folder" in capsys.readouterr().err
    assert evaluate.main([*base[:-3], "--data", str(data), str(data), "--task", "semantic"]) == 2
    assert "category 'toy' comes twice" in capsys.readouterr().err
    (tmp_path / "old.json").write_text(json.dumps({
        "task": "semantic", "arguments": {"strips": 1}, "episodes": {"other": []}}))
    assert evaluate.main([*base[:-1], "--replay", str(tmp_path / "old.json")]) == 2
    assert "no episodes of this data" in capsys.readouterr().err
    for wrong in (["--task", "semantic"], ["--task", "speed", "--data", "x"], []):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(["--out", "x", *wrong])
        assert stopped.value.code == 2


def test_strips_cut_the_longer_side_and_folders_need_no_manifest(tmp_path):
    rng = np.random.default_rng(0)
    for kind, count in (("good", 2), ("bad", 1)):
        (tmp_path / "mine" / kind).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 256, (90, 30), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "mine" / kind / f"{i}.png")
    mask = np.zeros((90, 30), np.uint8)
    mask[40:50, 5:9] = 255
    (tmp_path / "mine" / "mask").mkdir()
    Image.fromarray(mask).save(tmp_path / "mine" / "mask" / "0.png")
    records = episodes.read_source(str(tmp_path / "mine"), strips=3)["mine"]
    assert len(records) == 9 and [r["shows"] for r in records if r["bad"]] == [{"defect": 1}]
    bad = next(r for r in records if r["bad"])
    image, labels = read_record(bad)
    assert tuple(image.shape) == (3, 30, 30) and int((labels > 0).sum()) == 40
    assert bad["name"].endswith("#1")


def test_fewer_good_parts_than_asked_for_are_said(data, checkpoint, tmp_path, capsys):
    args = ["--task", "semantic", "--prompt", "both", "--normals", "8", "--seeds", "1"]
    assert evaluate.main([*args, "--data", str(data), "--out", str(tmp_path / "o"), "--model",
                          str(checkpoint)]) == 2
    assert "--normals: 6 good items for 8 prompts; ask for fewer" in capsys.readouterr().err
