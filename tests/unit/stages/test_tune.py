import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from edgesft.core import artifact, catalog, data, models, recipe
from edgesft.core.errors import ArtifactError, Interrupted, UsageError
from edgesft.core.journal import Journal
from edgesft.core.stage import execute
from edgesft.core.tuning import delta_file
from edgesft.stages.tune import Tune

torch.set_num_threads(1)
OPTIONS = data.DataOptions(template="{text}", label_words={"0": "b", "1": "g"}, max_length=64)
SPARSE = {"select": {"use": "small-magnitude"}, "estimate": {"use": "spsa"}, "lr": 1e-4}
TABLES = {
    "sparse-mezo": SPARSE,
    "mezo": {"select": {"use": "everything"}, "estimate": {"use": "spsa", "samples": 2}, "lr": 1e-4},
    "zo-lora": {
        "delta": {"use": "lora", "rank": 2},
        "estimate": {"use": "spsa"},
        "lr": 1e-3,
        "optimizer": "adam",
    },
    "lora": {"delta": {"use": "lora", "rank": 2, "dropout": 0.1}, "lr": 1e-3, "optimizer": "adam"},
    "full": {"lr": 1e-4, "optimizer": "adam", "weight_decay": 0.01},
    "magnitude": {"select": {"use": "magnitude", "density": 0.1}, "lr": 1e-2, "schedule": "cosine"},
}


def stage_of(name="sparse-mezo", **values):
    small = {"steps": 8, "batch_size": 4, "dev_limit": 8, "eval_every": 3, "snapshot_every": 3}
    return Tune.from_recipe(TABLES[name] | small | values, OPTIONS)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """Ends in x or o, which is the label: what a model without any knowledge can learn."""
    file = tmp_path_factory.mktemp("data") / "ends.jsonl"
    rows = ({"text": f"n {i * i % 97} {'xo'[i % 2]}", "label": i % 2} for i in range(400))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def inputs(tiny_model, sentences):
    return {"model": models.resolve(str(tiny_model)), "data": data.resolve(str(sentences), OPTIONS)}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """Digests of an unbroken run of each table, made when first asked for."""
    made = {}

    def of(name):
        if name not in made:
            out = tmp_path_factory.mktemp("whole") / name
            execute(stage_of(name), inputs, out)
            made[name] = out
        return made[name]

    return of


def digests(folder):
    """Of every product; the manifest holds times."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.name != artifact.MANIFEST
    }


def merged_of(out, model):
    base, delta = delta_file.base_of(model), delta_file.load(out)
    return {layer: delta.effective(layer, base(layer)) for layer in delta.layers}


@pytest.mark.parametrize("name", TABLES)
def test_every_combination_trains_and_repeats_bit_for_bit(name, inputs, whole, tmp_path):
    first, ran = execute(stage_of(name), inputs, tmp_path / "a")
    assert ran
    assert digests(tmp_path / "a") == digests(whole(name))
    assert first.digest == artifact.read(whole(name)).digest
    changed = merged_of(tmp_path / "a", inputs["model"].path)
    base = delta_file.base_of(inputs["model"].path)
    assert all(not torch.equal(w, base(layer)) for layer, w in changed.items())
    assert len(changed) == 14
    assert not (tmp_path / "a" / artifact.PARTIAL).exists()


def test_other_seeds_give_other_deltas(inputs, whole, tmp_path):
    execute(stage_of(seed=1), inputs, tmp_path / "d")
    assert digests(tmp_path / "d") != digests(whole("sparse-mezo"))


def test_metrics(whole):
    out = whole("sparse-mezo")
    m = artifact.read(out).metrics
    assert m["in_place"] is True
    assert m["trained_fraction_of_layers"] == pytest.approx(0.25, abs=1e-3)
    assert m["active_fraction"] == pytest.approx(0.25, abs=1e-2)
    assert m["trained_fraction"] == pytest.approx(m["trainable_values"] / m["parameters"])
    assert 0 < m["forward_fraction"] < 1
    assert m["peak_rss_bytes"] > 50e6
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["step"] for line in lines if "dev_loss" in line] == [0, 3, 6, 8]
    assert lines[0]["dev_loss"] == m["dev_loss_before"]
    assert lines[-1]["dev_loss"] == m["dev_loss_after"]
    assert {"loss", "lr", "projected_gradient", "active_fraction"} <= lines[1].keys()
    params = json.loads((out / "manifest.json").read_text())["params"]
    assert params["select"] == {"use": "small-magnitude", "density": 0.25}
    assert params["estimate"].items() >= {"use": "spsa", "eps": 1e-3, "samples": 1}.items()
    assert params["data"]["template"] == "{text}"
    assert params["lr"] == 1e-4


def test_back_propagation_learns_the_task(inputs, tmp_path):
    out, _ = execute(stage_of("lora", steps=40, lr=1e-2, batch_size=8), inputs, tmp_path / "d")
    assert out.metrics["dev_loss_after"] < 0.8 * out.metrics["dev_loss_before"]
    assert out.metrics["loss_last"] < out.metrics["loss_first"]


def test_zeroth_order_lowers_the_loss(inputs, tmp_path):
    stage = stage_of(steps=60, lr=3e-3, batch_size=16, eval_every=0, dev_limit=60)
    out, _ = execute(stage, inputs, tmp_path / "d")
    assert out.metrics["dev_loss_after"] < out.metrics["dev_loss_before"]
    assert out.metrics["loss_last"] < out.metrics["loss_first"]


def test_nothing_outside_the_region_changes(inputs, whole):
    stage = stage_of()
    base = delta_file.base_of(inputs["model"].path)
    for layer, weight in merged_of(whole("sparse-mezo"), inputs["model"].path).items():
        region = stage.select.region(layer, base(layer), None, 0.0)
        mask = region.mask(base(layer))
        assert torch.equal(weight[~mask], base(layer)[~mask])
        assert float((weight[mask] != base(layer)[mask]).float().mean()) > 0.99


# ---------------------------------------------------------------- interruption


class Killed(BaseException):
    """Stands for a kill: no handler of the product expects it."""


@contextmanager
def killed_at(monkeypatch, count):
    """Die at the count-th record, before it is written."""
    real, seen = Journal.append, [0]

    def append(self, record, *, sync=True):
        seen[0] += 1
        if seen[0] == count:
            raise Killed
        real(self, record, sync=sync)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(Killed):
            yield


@pytest.mark.parametrize(
    ("name", "at"),
    [("sparse-mezo", n) for n in (1, 2, 3, 9, 14, 20)]
    + [("mezo", 9), ("zo-lora", 4), ("zo-lora", 8), ("lora", 2), ("lora", 8), ("full", 7)],
)
def test_a_killed_run_goes_on_bit_for_bit(name, at, inputs, whole, tmp_path, monkeypatch):
    with killed_at(monkeypatch, at):
        execute(stage_of(name), inputs, tmp_path / "d")
    assert not (tmp_path / "d" / artifact.MANIFEST).exists()
    execute(stage_of(name), inputs, tmp_path / "d")
    assert digests(tmp_path / "d") == digests(whole(name))


def test_steps_in_place_are_replayed_not_taken_again(inputs, tmp_path, monkeypatch):
    from edgesft.core.tuning.tuned import Tuned

    with killed_at(monkeypatch, 18):  # 3 evaluations and 7 steps of 2 records
        execute(stage_of(), inputs, tmp_path / "d")
    real, calls = Tuned.loss, []
    monkeypatch.setattr(Tuned, "loss", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    execute(stage_of(), inputs, tmp_path / "d")
    assert len(calls) == 1


def test_a_snapshot_shortens_the_replay_beside_the_weights(inputs, tmp_path, monkeypatch):
    from edgesft.stages.tuning.trainee import Beside

    with killed_at(monkeypatch, 11):  # 3 evaluations and 7 steps; the last snapshot is after 6 steps
        execute(stage_of("zo-lora"), inputs, tmp_path / "d")
    real, calls = Beside.take, []
    monkeypatch.setattr(Beside, "take", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    execute(stage_of("zo-lora"), inputs, tmp_path / "d")
    assert len(calls) == 2


# ---------------------------------------------------------------- what a run watches


def test_one_loss_that_is_no_number_is_skipped_and_counted(inputs, tmp_path, monkeypatch):
    from edgesft.methods.objective.task import Task

    real, calls = Task.loss, []

    def loss(self, model, batch, reference=None):
        calls.append(1)
        return real(self, model, batch) * (float("nan") if len(calls) == 5 else 1)

    monkeypatch.setattr(Task, "loss", loss)
    done, _ = execute(stage_of(estimate={"use": "spsa", "two_sided": False}), inputs, tmp_path / "d")
    assert done.metrics["steps_skipped"] == 1
    lines = [json.loads(line) for line in (tmp_path / "d" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [3]


def test_a_leap_of_the_loss_is_undone_to_the_bit(inputs, tmp_path, monkeypatch):
    from edgesft.stages.tuning import guard

    monkeypatch.setattr(guard, "leapt", lambda losses: len(losses) == 7)
    monkeypatch.setattr(guard, "BACK", 4)
    leapt, _ = execute(stage_of(steps=7), inputs, tmp_path / "leapt")
    assert leapt.metrics["steps_taken_back"] == 4
    monkeypatch.undo()
    execute(stage_of(steps=3, schedule="constant"), inputs, tmp_path / "short")
    left, right = (merged_of(tmp_path / n, inputs["model"].path) for n in ("leapt", "short"))
    assert all(torch.equal(left[layer], right[layer]) for layer in right)


def test_a_run_stops_when_the_dev_loss_no_longer_falls(inputs, tmp_path):
    stage = stage_of(steps=60, eval_every=2, patience=2, lr=1e-12)
    done, _ = execute(stage, inputs, tmp_path / "d")
    assert done.metrics["steps"] <= 12


def test_the_learning_rate_that_is_found_lowers_the_loss(inputs, tmp_path):
    done, _ = execute(stage_of(lr="auto", steps=3), inputs, tmp_path / "d")
    trials = done.metrics["lr_trials"]
    assert done.metrics["lr"] == min(trials, key=lambda t: t[1])[0]
    assert min(t[1] for t in trials) < 0


def test_a_perturbation_that_is_rounded_away_is_refused_with_one_that_is_not(inputs, tmp_path):
    stage = stage_of(estimate={"use": "spsa", "eps": 1e-6}, base="bf16")
    with pytest.raises(UsageError, match=r"estimate.eps is 1e-06") as caught:
        execute(stage, inputs, tmp_path / "d")
    assert "estimate.eps=" in caught.value.hint


@pytest.mark.parametrize("base", ["bf16", "int8", "int4"])
def test_coarse_weights_are_tuned_and_merged(base, inputs, tmp_path):
    done, _ = execute(stage_of(base=base, lr=1e-2), inputs, tmp_path / "d")
    assert done.metrics["in_place"]
    merged = merged_of(tmp_path / "d", inputs["model"].path)
    base_of = delta_file.base_of(inputs["model"].path)
    assert any(not torch.equal(w, base_of(layer)) for layer, w in merged.items())


SCRIPT = """
import os, signal, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from edgesft.core import data, models
from edgesft.core.journal import Journal
from edgesft.core.stage import execute
from edgesft.stages.tune import Tune

model, file, out = sys.argv[1:]
options = data.DataOptions(template="{text}", label_words={"0": "b", "1": "g"}, max_length=64)
table = {"select": {"use": "small-magnitude"}, "estimate": {"use": "spsa"}, "lr": 1e-4}
table |= {"steps": 8, "batch_size": 4, "dev_limit": 8, "eval_every": 3, "snapshot_every": 3}
real, seen = Journal.append, [0]

def append(self, record, *, sync=True):
    real(self, record, sync=sync)
    seen[0] += 1
    if seen[0] == 7:
        with open(self._path, "ab") as file:
            file.write(b'{"step": 99, "lo')  # a torn line, as a power cut leaves it
        os.kill(os.getpid(), signal.SIGKILL)

Journal.append = append
inputs = {"model": models.resolve(model), "data": data.resolve(file, options)}
execute(Tune.from_recipe(table, options), inputs, Path(out))
"""


def test_a_process_killed_with_signal_9_goes_on_bit_for_bit(inputs, whole, tiny_model, sentences, tmp_path):
    arguments = [sys.executable, "-c", SCRIPT, str(tiny_model), str(sentences), str(tmp_path / "d")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "d" / artifact.PARTIAL).is_dir()
    execute(stage_of(), inputs, tmp_path / "d")
    assert digests(tmp_path / "d") == digests(whole("sparse-mezo"))


@pytest.mark.parametrize("name", ["sparse-mezo", "lora"])
def test_an_interruption_saves_and_goes_on_bit_for_bit(name, inputs, whole, tmp_path, monkeypatch):
    before, real = signal.getsignal(signal.SIGINT), Journal.append

    def append(self, record, *, sync=True):
        real(self, record, sync=sync)
        if record["step"] == 4 and "lr" in record:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", append)
        with pytest.raises(Interrupted, match="after 5 of 8 steps") as caught:
            execute(stage_of(name), inputs, tmp_path / "d")
    assert caught.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    execute(stage_of(name), inputs, tmp_path / "d")
    assert digests(tmp_path / "d") == digests(whole(name))


def test_runs_in_a_thread_too(inputs, tmp_path):
    thread = threading.Thread(target=lambda: execute(stage_of(steps=2), inputs, tmp_path / "d"))
    thread.start()
    thread.join()
    assert (tmp_path / "d" / artifact.MANIFEST).exists()


# ---------------------------------------------------------------- what it refuses


@pytest.mark.parametrize("name", ["sparse-mezo", "lora"])
def test_a_run_that_diverges_says_so_and_leaves_nothing(name, inputs, tmp_path, monkeypatch):
    from edgesft.methods.objective.task import Task

    real, calls = Task.loss, []

    def loss(self, model, batch, reference=None):
        calls.append(1)
        return real(self, model, batch) * (float("nan") if len(calls) > 10 else 1)

    monkeypatch.setattr(Task, "loss", loss)
    one_by_one = {"estimate": {"use": "spsa", "two_sided": False}} if name == "sparse-mezo" else {}
    with pytest.raises(UsageError, match="diverged") as caught:
        execute(stage_of(name, steps=20, **one_by_one), inputs, tmp_path / "d")
    assert "tune.lr=" in caught.value.hint
    assert not (tmp_path / "d").exists()


def test_a_last_step_that_diverges_is_no_result(inputs, tmp_path, monkeypatch):
    from edgesft.methods.objective.task import Task

    real, calls = Task.assess, []

    def assess(self, model, batch):
        calls.append(1)
        loss, right = real(self, model, batch)
        return (float("inf") if len(calls) > 2 else loss), right

    monkeypatch.setattr(Task, "assess", assess)
    with pytest.raises(UsageError, match="diverged"):
        execute(stage_of(eval_every=0), inputs, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_an_encoder_is_refused_before_it_is_loaded(inputs, tmp_path):
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    encoder = artifact.Artifact(folder, "model", "sha256:0", "some/encoder")
    with pytest.raises(ArtifactError, match=r"`some/encoder` is an encoder"):
        execute(stage_of(), inputs | {"model": encoder}, tmp_path / "d")


def test_regions_that_are_no_bands_are_tuned_beside_the_weight(tiny_model, monkeypatch):
    from edgesft.core.region import Flat
    from edgesft.methods.select.small_magnitude import SmallMagnitude

    monkeypatch.setattr(SmallMagnitude, "region", lambda *_: Flat(torch.arange(3)))
    tuned = stage_of()._tuned(models.load(tiny_model))
    assert not tuned.in_place
    assert tuned.trainable == 3 * 14


def test_sign_beside_the_weights_is_refused():
    with pytest.raises(UsageError, match="sign"):
        stage_of("zo-lora", optimizer="sign")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 3}, "stepz"),
        ({"steps": 0}, "tune.steps"),
        ({"lr": -1.0}, "tune.lr"),
        ({"optimizer": "lion"}, "tune.optimizer"),
        ({"select": {"use": "small-magntude"}}, "small-magntude"),
        ({"estimate": {"use": "spsa", "epz": 1}}, "epz"),
        ({"tokens": {"use": "lemo"}}, "no axis `tokens`"),
    ],
)
def test_bad_tables_are_refused_by_name(values, message):
    with pytest.raises(UsageError, match=message):
        Tune.from_recipe(SPARSE | values, OPTIONS)


def test_labels_without_a_template_are_refused(inputs, tmp_path):
    stage = Tune.from_recipe(SPARSE)
    with pytest.raises(ArtifactError, match="template"):
        execute(stage, inputs, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["full", "lora", "mezo", "sparse-mezo"])
def test_recipes_are_whole(name):
    stage = Tune.from_recipe(recipe.load(name).table("tune"))
    assert stage.steps == 300
    assert stage.params()["objective"] == {"use": "task"}
    assert json.loads(json.dumps(stage.params())) == stage.params()
    assert stage.in_place is ("mezo" in name)


def test_params_name_every_method():
    assert {a: stage_of().params()[a]["use"] for a in ("select", "delta", "estimate", "objective")} == {
        "select": "small-magnitude",
        "delta": "sparse",
        "estimate": "spsa",
        "objective": "task",
    }
    assert catalog.AXES[:4] == ("select", "delta", "estimate", "objective")


def test_a_stage_at_rest_imports_no_torch():
    code = "import sys, edgesft.stages.tune, edgesft.stages.merge; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert Path(catalog.ROOT).name == "methods"
