"""train.py: pairs, caches, ranks, accumulation, resuming. As a script, `python tests/test_train.py 20` kills a training 20 times."""
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import icas
import train

HOME = Path(icas.__file__).parent
icas.ENCODERS["tiny14"] = (48, 4, 3)
SHAPE = ["--encoder-name", "tiny14", "--image-size", "112", "--blocks", "2", "3", "4", "--queries", "12", "--dim", "32", "--layers", "1", "--ffn-dim",
         "32", "--pixel-dim", "8", "--batch-size", "4", "--log-every", "2", "--device", "cpu"]
RUNNER = """import sys, torch, icas
torch.set_num_threads(1)
icas.ENCODERS['tiny14'] = (48, 4, 3)
icas.fast_bf16 = lambda device: False
import train
sys.exit(train.main(sys.argv[1:]))
"""


def make_data(folder: Path, count: int = 6, name: str = "spots") -> Path:
    """Grey noise with one bright spot each, from `count` items, and two good ones."""
    rng, lines = np.random.default_rng(0), []
    (folder / name / "masks").mkdir(parents=True)
    for i in range(count + 2):
        image, mask = rng.integers(90, 140, (80, 90, 3), dtype=np.uint8), np.zeros((80, 90), np.uint8)
        line = {"image": f"{i}.png", "labels": {}, "split": "train", "group": str(i)}
        if i < count:
            y, x = rng.integers(5, 60, 2)
            image[y:y + 15, x:x + 15], mask[y:y + 15, x:x + 15] = 250, 1
            Image.fromarray(mask).save(folder / name / f"masks/{i}.png")
            line |= {"mask": f"masks/{i}.png", "labels": {"1": "spot"}}
        Image.fromarray(image).save(folder / name / f"{i}.png")
        lines.append(line)
    (folder / name / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / name


def make_encoder(folder: Path) -> str:
    torch.manual_seed(0)
    save_file(icas.Encoder("tiny14").state_dict(), folder / "encoder.safetensors")
    return str(folder / "encoder.safetensors")


def arguments(folder: Path, out: Path, *more) -> list[str]:
    return ["--stage", "anomaly", "--data", str(folder / "spots"), "--encoder", str(folder / "encoder.safetensors"), "--out", str(out), *SHAPE, *map(str, more)]


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    make_data(tmp_path)
    make_encoder(tmp_path)
    (tmp_path / "runner.py").write_text(RUNNER)
    return tmp_path


def start(home: Path, *args, **environment) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(home / "runner.py"), *args], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                            env=os.environ | {"PYTHONPATH": str(HOME), "OMP_NUM_THREADS": "1"} | environment)


def weights(out: Path) -> dict:
    return load_file(out / "last.safetensors")


def kill_until_done(home: Path, out: Path, kills: int, *more) -> int:
    """Start, kill -9 at random moments `kills` times, then let it end. Returns how often a state was resumed."""
    resumed, rng = 0, random.Random(0)
    for turn in range(kills + 1):
        process = start(home, *arguments(home, out, *more))
        if turn < kills:
            time.sleep(rng.uniform(2.0, 6.0))
            process.send_signal(signal.SIGKILL)
        resumed += "resumed at step" in process.communicate(timeout=300)[1]
        if (out / "last.safetensors").is_file():
            break
    return resumed


def test_a_killed_training_ends_with_the_same_bits(home):
    more = ("--steps", 60, "--save-minutes", 0, "--synthetic", 2, "--cache", home / "views")
    assert start(home, *arguments(home, home / "whole", *more)).wait(120) == 0
    resumed = kill_until_done(home, home / "killed", 2, *more)
    a, b = weights(home / "whole"), weights(home / "killed")
    assert resumed and all(torch.equal(a[k], b[k]) for k in a)
    assert not list((home / "killed").glob("state*"))


def test_two_processes_equal_one_and_so_do_micro_batches(home):
    more = ("--steps", 3, "--hide-features", 0.5, "--cache", home / "views")
    assert start(home, *arguments(home, home / "one", *more)).wait(120) == 0
    base = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29700 + os.getpid() % 200)}
    ranks = [start(home, *arguments(home, home / "two", *more), RANK=str(r), LOCAL_RANK=str(r), **base) for r in range(2)]
    errors = [p.communicate(timeout=120)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], errors
    assert start(home, *arguments(home, home / "micro", *more, "--accumulate", 4)).wait(120) == 0
    one = weights(home / "one")
    for other in ("two", "micro"):
        found = weights(home / other)
        assert all(torch.allclose(one[k].float(), found[k].float(), atol=2e-4) for k in one), other   # fp16 on disk: 2^-12 near 0.25
    logs = [[json.loads(line)["loss"] for line in (home / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two", "micro")]
    np.testing.assert_allclose(logs[1], logs[0], rtol=1e-4)
    np.testing.assert_allclose(logs[2], logs[0], rtol=1e-4)


def test_cached_and_fresh_views_have_the_same_loss(home, monkeypatch):
    args = train.parser().parse_args(arguments(home, home / "out", "--cache", home / "views"))
    model = train.start_model(args)
    cache, fresh = (train.open_sources(args, model, args.data, True, c)[0] for c in (True, False))
    stored = cache.view(1)
    again = train.finish(*train.augment(*train.read_record(fresh.records[1]), 112, np.random.default_rng([0, 1]), True), fresh.index[1]["names"], 8)
    assert torch.equal(stored.labels, again.labels) and (stored.small - again.small).abs().max() < 0.01
    losses = []
    for target in (stored, again):
        foreground = (target.labels == 1).float()
        batch = train.collate([train.sides(target, foreground, 1 - foreground) | {"target": target, "wanted": {1}}], model)
        losses.append(sum(icas.pair_loss(model, batch, torch.Generator().manual_seed(0)).values()).item())
    assert losses[0] == pytest.approx(losses[1], rel=0.02)                     # fp16 features and 8-bit stem images


def test_fresh_views_train_and_show_the_prompted_label(home, capsys):
    assert train.main(arguments(home, home / "out", "--steps", 2, "--synthetic", 2)) == 0
    out = capsys.readouterr()
    assert "loader" in out.err and "images/s" in out.err and (home / "out" / "last.safetensors").is_file()
    args = train.parser().parse_args(arguments(home, home / "out"))
    source = train.open_sources(args, train.start_model(args), args.data, True, False)[0]
    assert sum("spot" in source.view(i % 6, np.random.default_rng(i), "spot").names for i in range(24)) >= 23


def test_a_pair_does_not_depend_on_who_draws_it(home):
    args = train.parser().parse_args(arguments(home, home / "out", "--cache", home / "views"))
    model = train.start_model(args)
    sources = train.open_sources(args, model, args.data, True, True)
    whole = train.Pairs(sources, [1.0], {"spots"}, 4, 7, 0.5, 1, model)(3)[0]
    parts = train.Pairs(sources, [1.0], {"spots"}, 4, 7, 0.5, 2, model, workers=3)(3)
    for i, part in enumerate(parts):
        assert torch.equal(part.reference, whole.reference[2 * i:2 * i + 2]) and torch.equal(part.hidden, whole.hidden[2 * i:2 * i + 2])


def test_the_dry_run_says_what_would_happen(home, capsys):
    assert train.main(arguments(home, home / "out", "--dry-run")) == 0
    said = capsys.readouterr().err
    assert "anomaly: 5000 steps of 4 pairs, AdamW 0.0001" in said and "spots: 100 % of pairs, 8 images, 1 labels (6 spot)" in said
    assert not (home / "out").exists()


def test_validation_prints_the_baselines_and_keeps_the_best(home, capsys):
    make_data(home, name="others")
    more = ("--steps", 2, "--cache", home / "views", "--validate", home / "others", "--validate-every", 1, "--held-out", home / "others")
    assert train.main(arguments(home, home / "out", *more)) == 0
    said = capsys.readouterr().err
    assert "mean IoU icas" in said and "nearest patch" in said and "fusion: relation alone" in said and (home / "out" / "best.safetensors").is_file()
    assert train.main(arguments(home, home / "o", "--cache", home / "views", "--validate", home / "spots")) == 2


def test_damaged_states_and_a_full_disk_cost_nothing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "state.pt"
    for step in (1, 2):
        train.write_state(path, {"step": step})
    assert train.read_state(path)["step"] == 2
    path.write_bytes(path.read_bytes()[:20])
    assert train.read_state(path)["step"] == 1 and "damaged" in capsys.readouterr().err
    train.write_state(path, {"step": 3})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    train.write_state(path, {"step": 4})
    assert "No space left" in capsys.readouterr().err and train.read_state(path)["step"] == 3 and not path.with_suffix(".part").exists()


def test_bad_data_is_named_before_training(home, capsys):
    manifest = home / "spots" / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    for change, message in ((lambda r: r | {"image": "gone.png"}, "manifest.jsonl:1: image file is missing"),
                            (lambda r: r | {"mask": "../small.png"}, "manifest.jsonl:1: mask is (5, 5)")):
        Image.fromarray(np.ones((5, 5), np.uint8)).save(home / "small.png")
        manifest.write_text("\n".join([json.dumps(change(json.loads(lines[0]))), *lines[1:]]))
        assert train.main(arguments(home, home / "out", "--steps", 1)) == 2 and message in capsys.readouterr().err
    manifest.write_text("{broken\n")
    assert train.main(arguments(home, home / "out")) == 2 and "manifest.jsonl:1: not a JSON record" in capsys.readouterr().err
    manifest.write_text(lines[0])
    assert train.main(arguments(home, home / "out")) == 2 and "no label is in two images of ['spots']" in capsys.readouterr().err
    manifest.write_text("\n")
    assert train.main(arguments(home, home / "out")) == 2 and "the manifest has no record" in capsys.readouterr().err


def test_another_recipe_does_not_resume(home, capsys):
    train.write_state(home / "state.pt", {"arguments": "{}", "step": 1})
    (home / "out").mkdir()
    (home / "state.pt").replace(home / "out" / "state.pt")
    assert train.main(arguments(home, home / "out", "--steps", 2)) == 2 and "other arguments" in capsys.readouterr().err


if __name__ == "__main__":
    import tempfile
    folder = Path(tempfile.mkdtemp())
    make_data(folder), make_encoder(folder)
    (folder / "runner.py").write_text(RUNNER)
    more = ("--steps", 1500, "--save-minutes", 0, "--synthetic", 2, "--cache", folder / "views", "--log-every", 50)
    assert start(folder, *arguments(folder, folder / "whole", *more)).wait(900) == 0
    count = kill_until_done(folder, folder / "killed", int(sys.argv[1]), *more)
    digest = lambda n: hashlib.sha256((folder / n / "last.safetensors").read_bytes()).hexdigest()[:16]  # noqa: E731
    same = all(torch.equal(a, b) for a, b in zip(weights(folder / "whole").values(), weights(folder / "killed").values()))
    print(f"{sys.argv[1]} kills, resumed {count} times; unbroken {digest('whole')}, killed {digest('killed')}; weights bit-identical: {same}")
