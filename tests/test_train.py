"""train.py: pairs, caches, ranks, accumulation, resuming. `python tests/test_train.py 20` kills a
training twenty times.

Trainings that are killed, or that talk to each other, run in processes forked from a server that
has torch loaded: a start takes no time.
"""
import hashlib
import json
import multiprocessing
import os
import random
import sys
import time
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, HOME := str(Path(__file__).parents[1]))   # as a script, without installing
import icas  # noqa: E402
import train  # noqa: E402
from data_prep import views  # noqa: E402
from data_prep.augment import augment, cut_out, poisson_blend  # noqa: E402
from data_prep.pairs import sides as pair_sides  # noqa: E402
from data_prep.views import FreshSynthetic  # noqa: E402

icas.ENCODERS["tiny14"] = (48, 4, 3)
SHAPE = ["--image-size", "112", "--blocks", "2", "3", "4", "--queries", "12", "--dim", "32",
         "--layers", "1", "--ffn-dim", "32", "--pixel-dim", "8", "--batch-size", "4",
         "--log-every", "2", "--device", "cpu", "--workers", "2"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train"])


def make_data(folder: Path, count: int = 6, name: str = "spots", **more) -> Path:
    """Grey noise with one bright spot each, from `count` items, and two good ones."""
    rng, lines = np.random.default_rng(0), []
    (folder / name / "masks").mkdir(parents=True)
    for i in range(count + 2):
        image = rng.integers(90, 140, (80, 90, 3), dtype=np.uint8)
        mask = np.zeros((80, 90), np.uint8)
        line = {"image": f"{i}.png", "labels": {}, "split": "train", "group": str(i)} | more
        if i < count:
            y, x = rng.integers(5, 60, 2)
            image[y:y + 15, x:x + 15], mask[y:y + 15, x:x + 15] = 250, 1
            Image.fromarray(mask).save(folder / name / f"masks/{i}.png")
            line |= {"mask": f"masks/{i}.png", "labels": {"1": "spot"}}
        Image.fromarray(image).save(folder / name / f"{i}.png")
        lines.append(line)
    (folder / name / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / name


def make_home(folder: Path) -> None:
    make_data(folder)
    torch.manual_seed(0)
    save_file(icas.Encoder("tiny14").state_dict(), folder / "encoder.safetensors")


def arguments(folder: Path, out: Path, *more) -> list[str]:
    return ["--stage", "anomaly", "--data", str(folder / "spots"), "--encoder",
            str(folder / "encoder.safetensors"), "--out", str(out), *SHAPE, *map(str, more)]


def prepared(folder: Path, *more) -> train.Run:
    return train.Run(train.parser().parse_args(arguments(folder, folder / "out", *more)))


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(icas, "fast_bf16", lambda device: False)
    make_home(tmp_path)
    return tmp_path


def in_child(work, log: Path, environment: dict, *args) -> None:
    """What a forked process does: `work(*args)`, one thread, no bf16, stderr into `log`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    icas.fast_bf16 = lambda device: False
    icas.save = exactly
    sys.stderr = open(log, "w", buffering=1)
    sys.exit(work(*args))


def exactly(model: icas.ICAS, path: Path, training: dict) -> None:
    """icas.save without rounding to fp16, so that bits can be compared."""
    save_file(model.decoder.state_dict(), path, {"training": json.dumps(training)})


def start(work, log: Path, *args, **environment) -> multiprocessing.Process:
    process = SERVER.Process(target=in_child, args=(work, log, environment, *args))
    with unittest.mock.patch.dict(os.environ, PYTHONPATH=HOME):   # where the server finds train
        process.start()
    return process


def ended(process: multiprocessing.Process, log: Path) -> None:
    process.join(120)
    assert process.exitcode == 0, log.read_text()


def fingerprint(out: Path) -> str:
    """SHA-256 of the weights in OUT/last.safetensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(load_file(out / "last.safetensors").items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def kill_until_done(home: Path, out: Path, kills: int, longest: float, *more) -> tuple[int, int]:
    """Start, kill -9 at a random moment, `kills` times; then let it end. Returns how many were
    killed, and how many resumed."""
    killed, resumed, rng, log = 0, 0, random.Random(0), home / "killed.log"
    while not (out / "last.safetensors").is_file():
        log.write_text("")
        process = start(train.main, log, arguments(home, out, *more))
        if killed < kills:
            began, state = time.time(), out / "state.pt"
            before = state.stat().st_mtime_ns if state.is_file() else 0

            def further() -> bool:
                return state.is_file() and state.stat().st_mtime_ns > before
            while killed and time.time() - began < 20 and not further():
                time.sleep(0.002)              # all but the first, at the start, get a step further
            time.sleep(rng.uniform(0, longest))
            process.kill()
            process.join()
            killed += process.exitcode == -9
        else:
            ended(process, log)
        resumed += "resumed at step" in log.read_text()
    return killed, resumed


def test_a_killed_training_ends_with_the_same_bits(home):
    more = ("--steps", 24, "--save-minutes", 0, "--synthetic", 2, "--cache", home / "views")
    ended(start(train.main, home / "log", arguments(home, home / "whole", *more)), home / "log")
    killed, resumed = kill_until_done(home, home / "killed", 3, 0.3, *more)
    assert killed and resumed
    assert fingerprint(home / "killed") == fingerprint(home / "whole")
    assert not list((home / "killed").glob("state*"))
    broken, whole = (icas.read_lines(home / name / "log.jsonl") for name in ("killed", "whole"))
    assert [line["step"] for line in broken] == [line["step"] for line in whole]
    assert broken[-1]["images_a_second"] > 0


def share(home: str, path: str, *more) -> None:
    """Three steps of plain gradient descent, which does not hide a gradient of another size;
    weights and losses into `path`."""
    with views.ranks("cpu"):
        run, losses = prepared(Path(home), "--cache", f"{home}/views", "--jitter", 0.5,
                               "--shots", 2, *more), []
        run.model.decoder.requires_grad_(True)
        icas.fit(run.model, run.pairs, steps=3, lr=0.05, warmup=1,
                 optimizer=torch.optim.SGD(run.model.decoder.parameters()),
                 callback=lambda step, parts, optimizer: losses.append(parts["loss"]))
    torch.save((run.model.decoder.state_dict(), losses), path)


def test_two_processes_equal_one_and_so_do_micro_batches(home):
    base = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(29700 + os.getpid() % 200)}
    ranks = [start(share, home / f"log{r}", home, home / f"rank{r}", RANK=str(r), **base)
             for r in range(2)]                                      # which fill the cache together
    for r, process in enumerate(ranks):
        ended(process, home / f"log{r}")
    alone = {name: start(share, home / f"log {name}", home, home / name, *more)
             for name, more in (("one", ()), ("micro", ("--accumulate", 3)))}
    for name, process in alone.items():
        ended(process, home / f"log {name}")
    args = train.parser().parse_args(arguments(home, home / "out"))
    fresh = train.start_model(args).decoder.state_dict()
    one, losses = torch.load(home / "one")
    moved = max(float((one[k] - fresh[k]).abs().max()) for k in one)
    for name in ("rank0", "rank1", "micro"):
        found, same = torch.load(home / name)
        assert max(float((one[k] - found[k]).abs().max()) for k in one) < 1e-4 * moved, name
        np.testing.assert_allclose(same, losses, rtol=1e-5)


def test_cached_and_uncached_views_give_the_same_batches_and_losses(home):
    more = ("--views", 2, "--synthetic", 2, "--shots", 3)
    fresh, kept = (prepared(home, *more, *cache) for cache in ((), ("--cache", home / "views")))
    assert [s.folder is None for s in fresh.pairs.sources + kept.pairs.sources] == [1, 1, 0, 0]
    assert not (home / "out").exists()
    for step in range(4):
        one, other = fresh.pairs(step)[0], kept.pairs(step)[0]
        for a, b in zip((*one.sides, one.jitter), (*other.sides, other.jitter), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(one.truths, other.truths):
            assert torch.equal(a.masks, b.masks) and torch.equal(a.classes, b.classes)
        for name in ("maps", "detail"):   # kept in fp16
            a, b = (getattr(batch.reference, name) for batch in (one, other))
            torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)
        losses = [sum(icas.pair_loss(fresh.model, b, torch.Generator().manual_seed(0)).values())
                  for b in (one, other)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-3)


def test_without_a_number_of_views_every_draw_is_new_and_shows_the_label(home, capsys):
    assert train.main(arguments(home, home / "out", "--steps", 2, "--synthetic", 2)) == 0
    out = capsys.readouterr()
    assert "loader" in out.err and "images/s" in out.err
    assert (home / "out" / "last.safetensors").is_file()
    spots, synthetic = prepared(home, "--steps", 2, "--synthetic", 2).pairs.sources
    drawn = [spots.view(i % 6, np.random.default_rng(i), "spot") for i in range(24)]
    assert sum("spot" in v.names for v in drawn) >= 23
    assert not torch.equal(drawn[0].pixels, drawn[6].pixels)
    for label, entries in synthetic.by_label.items():
        one, two = (synthetic.view(entries[0], np.random.default_rng(i), label) for i in range(2))
        assert not torch.equal(one.labels, two.labels) and set(one.names) <= {label}


def test_with_a_cache_a_prompt_may_be_another_view_of_the_target(home):
    (source,) = prepared(home, "--cache", home / "views").pairs.sources
    assert any(source.views_of(i, "spot") for i in source.by_label["spot"])
    assert not any(i in source.views_of(i, "spot") for i in source.by_label["spot"])


def test_a_pair_does_not_depend_on_who_draws_it(home):
    more = ("--jitter", 0.5, "--shots", 3)
    whole = prepared(home, *more).pairs
    parts = prepared(home, *more, "--accumulate", 2, "--workers", 3).pairs
    for step in (3, 4):
        one, two = whole(step)[0], parts(step)
        for i, part in enumerate(two):
            some, shots = slice(2 * i, 2 * i + 2), one.sides[0].shape[1]
            for a, b in zip(part.sides, one.sides, strict=True):
                assert torch.equal(a, b[some])
            assert torch.equal(part.jitter, one.jitter[some])
            seen = one.reference.maps[some.start * shots:some.stop * shots]
            torch.testing.assert_close(part.reference.maps, seen)


def test_a_prompt_of_several_views_shows_one_item_and_never_the_targets(home):
    pairs = prepared(home, "--views", 4, "--shots", 3).pairs
    (source,), sizes = pairs.sources, set()
    table = source.by_label["spot"]
    for i in range(60):
        rng = np.random.default_rng(i)
        target, reference = (int(v) for v in rng.choice(table, 2, replace=False))
        chosen = pairs.prompt(source, reference, "spot", 3, target, rng)
        assert chosen[0] == reference and len(set(chosen)) == len(chosen) and target not in chosen
        assert {source.index[j]["image"] for j in chosen} == {source.index[reference]["image"]}
        sizes.add(len(chosen))
    assert max(sizes) == 3
    view = source.view(table[0])
    mark = (view.labels == 1).float()
    one, two = (pair_sides([(view, mark, 1 - mark)] * n, 3, pairs.model.config)["sides"]
                for n in (1, 2))
    assert [x.shape for x in one] == [(3, 2, 8, 8), (3, 2, 14, 14)] and not one[0][1:].any()
    assert torch.equal(two[0][1, 0], one[0][0, 0])   # every marked token of a copy,
    kept = two[0][1, 1].flatten() > 0
    other = (one[0][0, 0].flatten() == 0).numpy()
    fourth = [bool(o) and n % 4 == 1 for n, o in enumerate(other)]         # every fourth other
    assert (kept.numpy() & other).tolist() == fourth


def test_validation_measures_what_segment_gives_on_other_items(home):
    held = train.held_out(prepared(home).model, [str(home / "spots")])
    assert len(held) == 2
    for store, episode in held:
        groups = [{store.records[n]["group"] for n in episode[k]} for k in ("prompts", "tests")]
        assert not groups[0] & groups[1] and len(episode["tests"]) == 5 and not episode["good"]
    found, expected = train.validate(held), []
    for store, episode in held:
        ready, both, either = store.shown(episode), 0, 0
        assert len(ready.references) == 1 and len(ready.references.shots) == 12
        for name in episode["tests"]:
            mask, truth = icas.segment(store.image(name), ready).mask, store.truth(name, "spot")
            both, either = both + (mask & truth).sum(), either + (mask | truth).sum()
        expected.append(100 * both / either)
    assert found["icas"] == pytest.approx(np.mean(expected))
    assert {"S_s", "S_s mfm", "block 4 nearest"} < set(found)


def test_good_parts_as_prompts_are_of_the_same_object_and_labels_are_by_object(home):
    manifest = home / "spots" / "manifest.jsonl"
    second = make_data(home, name="second", category="bolt")
    lines = [json.loads(line) | {"category": "nut"} for line in manifest.read_text().splitlines()]
    for r in map(json.loads, (second / "manifest.jsonl").read_text().splitlines()):
        r |= {"image": f"../second/{r['image']}", "group": f"b{r['group']}"}
        lines.append(r | ({"mask": f"../second/{r['mask']}"} if "mask" in r else {}))
    lines[7] |= {"anomalous": True}         # of the four without a mask, one is known to be bad
    manifest.write_text("\n".join(map(json.dumps, lines)))
    pairs = prepared(home).pairs
    source = pairs.sources[0]
    assert list(source.by_label) == ["bolt spot", "nut spot"]
    assert {k: len(v) for k, v in source.good.items()} == {"nut": 1 + 6, "bolt": 2 + 6}   # clean
    drawn, view = [], source.view
    source.view = lambda i, *more: drawn.append(i) or view(i, *more)
    seen = 0
    for i in range(60):
        drawn.clear()
        pair = pairs.draw(np.random.default_rng(i))
        assert len({source.index[j]["category"] for j in drawn}) == 1
        if not pair["sides"][0][:, 0].any() and len(drawn) > 1:
            seen += 1
            shown = source.index[drawn[1]]
            assert shown["clean"] or not shown["names"]
    assert seen > 3


def test_the_dry_run_says_what_would_happen_and_writes_nothing(home, capsys):
    make_data(home, name="others")
    manifest = home / "spots" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"spot"', '"dent"', 1))
    more = ("--dry-run", "--cache", home / "views", "--validate", home / "others", "--seed", 3,
            "--accumulate", 2, "--shots", 2, "--jitter", 0.3)
    assert train.main(arguments(home, home / "out", *more)) == 0
    said = capsys.readouterr().out
    assert "anomaly: 5000 steps, 4 pairs, ranks 1, micro-batches 2, seed 3, AdamW 0.0001" in said
    assert "50 % of the target's image; relation maps jittered by 0.3; mild augmentation" in said
    assert "prompts of up to 2 views" in said and "clip 1" in said and "float32" in said
    assert "spots: 100 % of pairs, 14 images, 8 good, 2 labels (5 spot, 1 dent)" in said
    assert "1 labels in one image only, as 'dent': their pairs are two views of it" in said
    assert not (home / "out").exists() and not (home / "views").exists()


def test_the_defaults_are_the_papers_recipe():
    args = train.parser().parse_args(["--stage", "generic", "--data", "x", "--out", "y"])
    assert (args.batch_size, args.lr, args.image_size, args.queries, args.layers, args.dim,
            args.ffn_dim, args.pixel_dim) == (32, 1e-4, 518, 200, 6, 256, 1728, 256)
    assert (args.same_image, args.jitter, args.strong_augmentation,
            args.synthetic) == (0.5, 0, False, 0)


@pytest.mark.parametrize("strong", [False, True])
def test_augmented_masks_stay_on_their_defects_at_every_scale(strong):
    image, labels = torch.full((3, 60, 90), 0.8), torch.zeros(60, 90, dtype=torch.uint8)
    image[:, 20:40, 30:60], labels[20:40, 30:60] = 0.2, 3
    areas = []
    for i in range(60):
        rng = np.random.default_rng(i)
        view, marked = augment(image, labels, 84, rng, True, strong)
        inside, outside = (view[:, side].mean(dim=1) for side in (marked > 0, marked == 0))
        assert view.shape == (3, 84, 84) and 0 <= view.min() and view.max() <= 1
        assert set(marked.unique().tolist()) <= {0, 3} and (marked > 0).sum() >= 12
        assert strong or (inside < outside - 0.1).all()     # strong colour may turn light to dark
        areas.append(int((marked > 0).sum()))
    assert max(areas) > (4 if strong else 8) * min(areas)
    for h, w in ((1, 1), (3, 200), (400, 20)):  # any shape
        ones = torch.ones(h, w, dtype=torch.uint8)
        rng = np.random.default_rng(0)
        view, marked = augment(torch.rand(3, h, w), ones, 28, rng, True, strong)
        assert view.shape == (3, 28, 28) and marked.any()


def test_the_papers_rows_without_our_departures_can_be_trained(home):
    """Table 7 without greedy queries, and without debiasing, relation maps and detail."""
    more = ("--steps", 2, "--no-gqs", "--debias", 0, "--no-correspondence", "--no-detail")
    assert train.main(arguments(home, home / "out", *more)) == 0
    checkpoint = home / "out" / "last.safetensors"
    model = icas.load(checkpoint, encoder=home / "encoder.safetensors")
    assert model.config.learned_queries and not model.config.correspondence
    assert model.config.debias == 0 and not model.config.detail and model.detail is None
    assert not hasattr(model.decoder, "relation") and model.decoder.content_embed.shape == (12, 32)


def test_another_encoder_is_known_by_its_file_and_the_checkpoint_keeps_to_it(home, capsys):
    with unittest.mock.patch.dict(icas.ENCODERS, mini14=(32, 3, 2)):
        other, checkpoint = home / "mini.safetensors", home / "out" / "last.safetensors"
        save_file(icas.Encoder("mini14-reg").state_dict(), other)
        more = ("--steps", 2, "--encoder", other, "--blocks", 2, 3, "--debias", 4)
        assert train.main(arguments(home, home / "out", *more)) == 0
        model = icas.load(checkpoint, encoder=other)
        c = model.config
        assert (c.encoder, c.blocks, c.detail) == ("mini14-reg", (2, 3), True)
        assert model.encoder_sha256 == icas.sha256(other)
        assert model.decoder.neck[0].in_channels == 2 * 32
        with pytest.raises(ValueError, match="the checkpoint was trained with"):
            icas.load(checkpoint, encoder=home / "encoder.safetensors")
        more = ("--steps", 2, "--init", checkpoint)
        assert train.main(arguments(home, home / "next", *more, "--encoder", other)) == 0
        found = icas.load(home / "next" / "last.safetensors", encoder=other)
        assert found.config == c
        capsys.readouterr()
        assert train.main(arguments(home, home / "wrong", *more)) == 2
        assert "the checkpoint was trained with" in capsys.readouterr().err
    assert train.main(arguments(home, home / "o", "--encoder", home / "nowhere")) == 2
    assert "no file at" in capsys.readouterr().err
    assert train.main(arguments(home, home / "o", "--encoder", other)) == 2   # of no known size
    assert "has width 32 and 3 blocks" in capsys.readouterr().err


def test_validation_prints_the_baseline_and_keeps_the_best(home, capsys):
    make_data(home, name="others")
    more = ("--steps", 2, "--validate", home / "others", "--validate-every", 1)
    assert train.main(arguments(home, home / "out", *more)) == 0
    said = capsys.readouterr().err
    assert "| mean IoU " in said and "S_s mfm" in said and "block 4 nearest" in said
    log = [json.loads(line) for line in (home / "out/log.jsonl").read_text().splitlines()]
    found = [line["validation"] for line in log if "validation" in line]
    assert {"icas", "S_s", "S_s mfm", "block 4 nearest"} < set(found[-1]) and len(found) == 2
    with views.safe_open(home / "out" / "best.safetensors", "pt") as file:
        best = json.loads(file.metadata()["training"])["validation"]
    assert best["S_s mfm"] == max(f["S_s mfm"] for f in found)
    assert icas.load(home / "out/best.safetensors", encoder=home / "encoder.safetensors")
    assert train.main(arguments(home, home / "o", "--validate", home / "spots")) == 2
    assert "is trained on too" in capsys.readouterr().err
    same = home / "spots" / "manifest.jsonl"
    assert train.main(arguments(home, home / "o", "--validate", same)) == 2
    assert "is trained on too" in capsys.readouterr().err
    lone = make_data(home, count=1, name="lone")
    for more in ((), ("--dry-run",)):
        assert train.main(arguments(home, home / "o", "--validate", lone, *more)) == 2
        said = capsys.readouterr().err
        assert "no defect type is marked in two images of different items" in said
    assert train.main(arguments(home, home / "o", "--dry-run", "--validate", home / "nowhere")) == 2


def test_validation_changes_no_weight(home):
    make_data(home, name="others")
    for name, more in (("plain", ()), ("held", ("--validate", home / "others"))):
        more += ("--steps", 3, "--validate-every", 1)
        assert train.main(arguments(home, home / name, *more)) == 0
    assert fingerprint(home / "plain") == fingerprint(home / "held")


def test_damaged_states_and_a_full_disk_cost_nothing(tmp_path, capsys):
    resource, path = pytest.importorskip("resource"), tmp_path / "state.pt"
    for step in (1, 2):
        train.write_state(path, {"step": step, "w": torch.ones(9000)})
    assert train.read_state(path)["step"] == 2
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    old = (tmp_path / "state.old").read_bytes()
    for broken in (whole[:20], whole[:-100], b"", bytes(flipped)):
        path.write_bytes(broken)
        assert train.read_state(path)["step"] == 1 and "damaged" in capsys.readouterr().err
        train.write_state(path, {"step": 3})
        assert (tmp_path / "state.old").read_bytes() == old   # a damaged one replaces no whole one
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # writes fail, as on a full disk
    try:
        train.write_state(path, {"step": 4, "w": torch.ones(9000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "could not be written" in capsys.readouterr().err and train.read_state(path)["step"] == 3
    assert not list(tmp_path.glob("*.part"))


def on_a_full_disk(*args: str) -> int:
    import resource
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit))
    return train.main(list(args))


def test_a_full_disk_does_not_end_a_training(home):
    pytest.importorskip("resource")
    more = ("--steps", 4, "--save-minutes", 0)
    process = start(on_a_full_disk, home / "log", *arguments(home, home / "out", *more))
    process.join(60)
    said = (home / "log").read_text()
    assert process.exitcode == 1 and said.count("could not be written") == 3
    assert "step      4/4" in said and "Traceback" not in said
    assert train.main(arguments(home, home / "out", *more)) == 0


def test_a_finished_run_is_not_trained_again_and_another_recipe_does_not_resume(home, capsys):
    last, new = home / "out" / "last.safetensors", home / "new"
    assert train.main(arguments(home, home / "out", "--steps", 2)) == 0
    written = last.stat().st_mtime_ns
    assert train.main(arguments(home, home / "out", "--steps", 2, "--log-every", 7)) == 0
    assert last.stat().st_mtime_ns == written
    assert "step " not in capsys.readouterr().err.split("float32")[-1]
    assert train.main(arguments(home, home / "out", "--steps", 3)) == 2
    assert "other arguments" in capsys.readouterr().err
    new.mkdir()
    train.write_state(new / "state.pt", {"arguments": {}, "step": 1})
    assert train.main(arguments(home, new, "--steps", 2)) == 2
    assert "other arguments" in capsys.readouterr().err


def test_the_generic_stage_trains_and_the_anomaly_stage_goes_on_from_it(home):
    generic = arguments(home, home / "generic", "--steps", 2)
    generic[generic.index("anomaly")] = "generic"
    assert train.main(generic) == 0
    init = home / "generic" / "last.safetensors"
    assert train.main(arguments(home, home / "out", "--steps", 1, "--init", init)) == 0
    assert (home / "out" / "last.safetensors").is_file()


@pytest.mark.parametrize("changed", ["mask", "image"])
def test_other_contents_under_the_same_names_are_encoded_anew(home, changed):
    more = ("--views", 1, "--cache", home / "views")
    first = prepared(home, *more).pairs.sources[0]
    assert prepared(home, *more).pairs.sources[0].folder == first.folder
    path = Path(first.records[0][changed])
    pixels = 255 - np.array(Image.open(path)) // 2
    # as long as before: what lies behind the end of a picture is not read
    length = path.stat().st_size
    Image.fromarray(pixels).save(path, compress_level=9)
    path.write_bytes(path.read_bytes().ljust(length, b"\0"))
    assert prepared(home, *more).pairs.sources[0].folder != first.folder


def test_a_cache_that_was_cut_off_goes_on_and_one_made_otherwise_is_not_read(home, monkeypatch):
    more = ("--views", 3, "--cache")                                     # 8 x 3 + 6: two chunks
    whole = prepared(home, *more, home / "whole").pairs.sources[0]
    encode, calls = views.encode, []

    def dies(model, some):
        calls.append(len(some))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(model, some)
    monkeypatch.setattr(views, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        prepared(home, *more, home / "views")
    (folder,) = (home / "views").iterdir()
    (folder / "16.part").write_bytes(b"half a view")
    found = prepared(home, *more, home / "views").pairs.sources[0]
    assert calls == [16, 14, 14] and found.index == whole.index and len(found.index) == 30
    assert found.folder == folder and len(list(folder.iterdir())) == 30
    for i in range(30):
        for name in ("maps", "detail", "labels"):
            assert torch.equal(*(source.kept(i, name)[0] for source in (found, whole)))
    calls[1:] = ["both are there"]
    for other in (("--views", 2), ("--image-size", 98), ("--seed", 1), ("--blocks", 3, 4),
                  ("--strong-augmentation",), ("--images", 5), ("--stage", "generic")):
        source = prepared(home, *more, home / "views", *other).pairs.sources[0]
        assert source.folder != folder and len(list(folder.iterdir())) == 30


def test_a_full_disk_under_a_cache_is_said_and_the_same_command_goes_on(home, capsys, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    more = ("--cache", home / "views", "--steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(views, "save_file", full)
        assert train.main(arguments(home, home / "out", *more)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert train.main(arguments(home, home / "out", *more)) == 0


def test_bad_data_is_named_before_training(home, capsys):
    manifest = home / "spots" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    Image.fromarray(np.ones((5, 5), np.uint8)).save(home / "small.png")
    (home / "text.png").write_text("no picture")
    code = {"size": [5, 5], "counts": "0"}
    for change, message in (
            ({"image": "gone.png"}, "manifest.jsonl:2: image file is missing"),
            ({"mask": "../small.png"}, "manifest.jsonl:2: mask is (5, 5)"),
            ({"mask": {"1": code}}, "manifest.jsonl:2: mask is (5, 5)"),
            ({"image": 3}, 'manifest.jsonl:2: expected a record with "image"'),
            ({"image": "../text.png"}, "text.png' is not a readable image"),
            ({"labels": {"a": "b"}}, "manifest.jsonl:2: labels"),
            ({"mask": None}, "manifest.jsonl:2: mask: expected a path")):
        changed = json.dumps(json.loads(lines[1]) | change)
        manifest.write_text("\n".join([lines[0], changed, *lines[2:]]))
        assert train.main(arguments(home, home / "out", "--steps", 1)) == 2
        assert message in capsys.readouterr().err
    for name, value, message in (
            ("--same-image", 1.5, "--same-image: expected 0 to 1, got 1.5"),
            ("--shots", 0, "--shots: expected 1 to inf, got 0"),
            ("--steps", 0, "--steps: expected 1 to inf, got 0"),
            ("--views", -1, "--views: expected 0 to inf, got -1"),
            ("--weights", 0, "--weights: expected one number for each of ['spots']")):
        manifest.write_text("\n".join(lines))
        assert train.main(arguments(home, home / "out", name, value)) == 2
        assert message in capsys.readouterr().err
    for text, message in (("{broken\n", "manifest.jsonl:1: not a JSON record"),
                          (lines[0], "no label is in two images of 'spots'"),
                          ("\n", "the manifest has no record"),
                          ("[1]", "manifest.jsonl:1: expected a record")):
        manifest.write_text(text)
        assert train.main(arguments(home, home / "out")) == 2
        assert message in capsys.readouterr().err
    assert not (home / "out").exists()


def kill(times: int) -> None:
    import tempfile
    home = Path(tempfile.mkdtemp())
    make_home(home)
    more = ("--steps", 400, "--save-minutes", 0, "--synthetic", 2, "--cache", home / "views",
            "--log-every", 100)
    began = time.time()
    ended(start(train.main, home / "log", arguments(home, home / "whole", *more)), home / "log")
    killed, resumed = kill_until_done(home, home / "killed", times, 1.5, *more)
    whole, broken = fingerprint(home / "whole"), fingerprint(home / "killed")
    print(f"unbroken {whole}\n  killed {broken}\n{killed} kills, {resumed} resumed, "
          f"{time.time() - began:.0f} s, bit-identical: {whole == broken}")


if __name__ == "__main__":
    kill(int(sys.argv[1]))


# ---- real defects on other surfaces --------------------------------------------------------------

def test_a_blended_patch_keeps_its_laplacian_inside_and_the_surface_outside(rng):
    surface, patch = torch.from_numpy(rng.random((2, 3, 20, 24))).float()
    surface, patch = 0.4 + 0.1 * surface, 0.5 + 0.1 * patch   # nothing is clipped
    mask = torch.zeros(20, 24, dtype=torch.bool)
    mask[6:13, 5:18] = True
    blended = poisson_blend(surface, patch, mask)
    around = scipy.ndimage.binary_dilation(mask.numpy(), iterations=2)
    assert torch.equal(blended[:, ~around], surface[:, ~around])
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    one, two = (torch.nn.functional.conv2d(x[:, None], kernel, padding=1)[:, 0]
                for x in (blended, patch))
    torch.testing.assert_close(one[:, around], two[:, around], atol=1e-4, rtol=1e-4)
    # a patch that is the surface, only lighter, leaves no trace; nor does one without a mark
    torch.testing.assert_close(poisson_blend(surface, surface + 0.3, mask), surface)
    assert torch.equal(poisson_blend(surface, patch, mask & False), surface)


def test_a_cut_out_is_one_region_with_a_frame_at_the_size_it_would_have(rng):
    image, marked = torch.zeros(3, 100, 100), torch.zeros(100, 100, dtype=torch.bool)
    marked[20:40, 30:60] = True
    marked[70:72, 5:7] = True
    image[:, marked] = 1
    areas = []
    for i in range(20):
        draw = np.random.default_rng(i)
        patch, mask = cut_out(image, marked, 200, np.random.default_rng(1), draw)
        assert patch.shape[1:] == mask.shape and not (mask[[0, -1]].any() or mask[:, [0, -1]].any())
        assert patch[:, mask].mean() > 0.9 and patch[:, ~mask].mean() < 0.3
        areas.append(int(mask.sum()))
    assert 0.4 * 2400 < min(areas) < 0.7 * 2400 < 1.4 * 2400 < max(areas) < 2.1 * 2400   # 0.7, 1.4


def test_every_third_synthetic_kind_is_a_real_defect_and_some_surfaces_show_another(
        home, monkeypatch):
    source = FreshSynthetic([home / "spots"], 6, 112, views=2)
    base = torch.full((3, 112, 112), 0.5)
    pixels, mask = source.damage(0, base, np.random.default_rng(0))   # a spot of 15 of 90 pixels
    around = torch.from_numpy(scipy.ndimage.binary_dilation(mask.numpy(), iterations=2))
    assert torch.equal(pixels[:, ~around], base[:, ~around]) and 100 < mask.sum() < 900
    assert not torch.equal(pixels, base)
    drawn, damage = [], source.damage
    monkeypatch.setattr(source, "damage", lambda kind, *x: drawn.append(kind) or damage(kind, *x))
    counts = []
    for i in range(42):   # seven entries a kind, the last one the surface alone
        drawn.clear()
        pixels, labels = source.draw(i, None)
        assert pixels.shape == (3, 112, 112) and 0 <= pixels.min() and pixels.max() <= 1
        assert drawn[-1:] == [i // 7] if i % 7 < 6 else not labels.any()
        counts.append(len(drawn) - (i % 7 < 6))
    assert set(counts) == {0, 1} and 4 <= sum(counts) <= 20   # three in ten, of five kinds in six
