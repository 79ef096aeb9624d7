import contextlib
import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.protocols import Mask, Shift
from edgesft.core.tuning import trajectory
from edgesft.core.tuning.scalar_optim import Adam, Measured, updates
from edgesft.core.tuning.schedule import derive
from edgesft.core.tuning.trajectory import Settings, Trajectory

SEED = 7
SHAPES = {"model.layers.0.q": (3, 5), "model.layers.1.q": (8, 4), "model.layers.0.k": (1, 9)}
MASKS = {
    "model.layers.0.q": Mask(high=0.1),
    "model.layers.1.q": Mask(low=1 / 3, high=math.inf, keep=100, seed=2**63 - 1),
    "model.layers.0.k": Mask(),
}


def steps_of(numbers, *, seed=SEED, directions=1, law="rademacher", lr=None):
    rank = 2 if law == "low-rank" else 0
    return [
        Measured(
            step,
            1e-3 / (1 + step) if lr is None else lr,
            tuple(
                Shift(derive(derive(seed, "step", step), i), (step - 2.7) / (3 + i), law, rank)
                for i in range(directions)
            ),
        )
        for step in numbers
    ]


def hashes(tag, names=SHAPES):
    return {name: derive(tag, name).to_bytes(8, "little") * 4 for name in names}


def trajectory_of(measured=None, *, steps=6, best=4, settings=None):
    return Trajectory.of(
        settings or Settings(seed=SEED, optimizer="adam", weight_decay=0.01, rounding=5, about={"eps": 1e-3}),
        steps_of(range(6)) if measured is None else measured,
        shapes=SHAPES,
        masks=MASKS,
        base=hashes("base"),
        final=hashes("final"),
        steps=steps,
        best=best,
        best_digests=hashes("best"),
    )


def same(a, b):
    return all(getattr(a, f.name) == getattr(b, f.name) for f in dataclasses.fields(a))


VARIANTS = {
    "plain": {},
    "gaps": {"measured": tuple(steps_of([0, 3, 5]))},
    "foreign seeds": {"measured": tuple(steps_of(range(6), seed=8))},
    "several directions": {"measured": tuple(steps_of(range(6), directions=3))},
    "uneven": {"measured": (*steps_of([0], directions=2), *steps_of([1, 2]), *steps_of([4], directions=4))},
    "one rate": {"measured": tuple(steps_of(range(6), lr=0.1))},
    "low rank": {"measured": tuple(steps_of(range(6), law="low-rank"))},
    "nothing measured": {"measured": (), "best": None},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path):
    run = trajectory_of(**VARIANTS[name])
    assert run.save(tmp_path) == tmp_path / "trajectory.safetensors"
    found = trajectory.load(tmp_path)
    assert same(found, run)
    assert list(found.layers) == list(SHAPES), "the order of the layers stays"
    assert found.updates() == run.updates()
    assert same(trajectory.load(tmp_path / trajectory.FILE), run)


def test_what_can_be_derived_is_not_written(tmp_path):
    trajectory_of(steps_of(range(6), lr=0.1)).save(tmp_path)
    tensors = load_file(tmp_path / trajectory.FILE)
    assert not {"seeds", "steps"} & set(tensors)
    assert tensors["lr"].tolist() == [0.1]
    trajectory_of(VARIANTS["gaps"]["measured"]).save(tmp_path)
    assert load_file(tmp_path / trajectory.FILE)["steps"].tolist() == [0, 3, 5]
    trajectory_of(VARIANTS["foreign seeds"]["measured"]).save(tmp_path)
    assert load_file(tmp_path / trajectory.FILE)["seeds"][2] == derive(derive(8, "step", 2), 0)


def test_equal_runs_give_equal_bytes(tmp_path):
    """In another process too, where strings hash differently."""
    trajectory_of().save(tmp_path)
    first = (tmp_path / trajectory.FILE).read_bytes()
    code = (
        "import sys; from pathlib import Path; from edgesft.core.tuning import trajectory as t;"
        "assert 'torch' not in sys.modules;"
        "t.load(Path(sys.argv[1])).save(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=60)
    assert (tmp_path / trajectory.FILE).read_bytes() == first


def test_a_thousand_steps_of_smollm2_fit_into_64_kib(tmp_path):
    inner = {"q_proj": (576, 576), "k_proj": (192, 576), "v_proj": (192, 576), "o_proj": (576, 576)}
    shapes = {f"model.layers.{i}.self_attn.{n}": s for i in range(30) for n, s in inner.items()}
    for i in range(30):
        shapes |= {f"model.layers.{i}.mlp.{n}": (1536, 576) for n in ("gate_proj", "up_proj", "down_proj")}
    run = Trajectory.of(
        Settings(seed=1, optimizer="adam", about={"eps": 1e-3, "steps": 1000, "lr": 1e-6}),
        steps_of(range(1000), seed=1),
        shapes=shapes,
        masks={name: Mask(high=float(np.float32(0.02 / (3 + i)))) for i, name in enumerate(shapes)},
        base=hashes(1, shapes),
        final=hashes(2, shapes),
        steps=1000,
        best=900,
        best_digests=hashes(3, shapes),
    )
    size = run.save(tmp_path).stat().st_size
    assert len(shapes) == 210
    assert size < 64 << 10, f"{size} bytes"
    assert len(trajectory.load(tmp_path).updates()) == 1000


def test_updates_up_to_a_step_are_those_of_the_steps_before_it(tmp_path):
    run = trajectory_of(VARIANTS["gaps"]["measured"], steps=9, best=4)
    whole = updates(Adam(0.01, 5), run.measured)
    assert run.updates() == run.updates(9) == run.updates(6) == whole
    assert run.updates(4) == whole[:2] == run.updates(5)
    assert run.updates(3) == whole[:1]
    assert run.updates(0) == []
    assert [run.at(step) for step in ("last", "best", 0, 9)] == [9, 4, 0, 9]


def test_steps_that_the_run_lacks_are_refused():
    run = trajectory_of()
    for step in (-1, 7):
        with pytest.raises(UsageError, match=f"`?{step}`?.*0 to 6"):
            run.at(step)
    with pytest.raises(UsageError, match="best"):
        trajectory_of(best=None).at("best")


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ([*steps_of([1, 0])], "ascend"),
        ([*steps_of([6])], "ascend"),
        ([*steps_of([0]), *steps_of([1], law="gaussian")], "one law"),
        ([Measured(0, 0.1, ())], "no direction"),
        ([Measured(0, 0.1, (Shift(1, math.nan),))], "finite"),
        ([Measured(0, math.inf, (Shift(1, 1.0),))], "finite"),
    ],
)
def test_what_is_no_run_is_not_written(measured, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trajectory_of(measured).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- untrusted files


@pytest.fixture
def parts(tmp_path):
    """(tensors, about) of a file with every column in it, and a way to write them back."""
    measured = [*steps_of([0, 2], directions=2, seed=1), *steps_of([3, 5], seed=1)]
    trajectory_of(measured).save(tmp_path)
    file = tmp_path / trajectory.FILE
    with safe_open(file, "np") as opened:
        about = json.loads(opened.metadata()["trajectory"])

    def write(tensors, about):
        save_file(tensors, file, {"trajectory": json.dumps(about)})
        return tmp_path

    return load_file(file), about, write


def test_the_parts_are_a_whole_file(parts):
    tensors, about, write = parts
    assert set(tensors) == set(trajectory._COLUMNS)
    assert trajectory.load(write(tensors, about)).steps == 6


def changed(array, at, value):
    found = array.copy()
    found[at] = value
    return found


TENSORS = {
    "scales": [(lambda a: changed(a, 3, np.nan), "gradient 3.*finite"), (lambda a: a[:-1], "do not fit")],
    "counts": [(lambda a: changed(a, 0, 0), "counts.*1 to"), (lambda a: a[:2], "expected 4"),
               (lambda a: changed(a, 0, 2**31 - 1), "counts")],
    "lr": [(lambda a: changed(a, 2, np.inf), "lr"), (lambda a: changed(a, 2, -1.0), "lr"),
           (lambda a: np.stack([a, a]), "one dimension")],
    "steps": [(lambda a: a[::-1].copy(), "ascend"), (lambda a: changed(a, 3, 6), "steps.*0 to 5"),
              (lambda a: a[:1], "ascend")],
    "seeds": [(lambda a: changed(a, 0, -1), "seeds"), (lambda a: a[1:], "expected 6"),
              (lambda a: a.astype(np.int32), "I32")],
    "shape": [(lambda a: a[1:], "shape"), (lambda a: changed(a, (0, 0), 0), "no entries")],
    "base": [(lambda a: a[:, :31].copy(), "base"), (lambda a: a[:2], "base")],
    "final": [(lambda a: a[:0], "final")],
    "low": [(lambda a: changed(a, 1, np.nan), "low.*nan"), (lambda a: changed(a, 1, -0.5), "low")],
    "high": [(lambda a: changed(a, 2, -1.0), "high"), (lambda a: a[:0], "high")],
    "keep": [(lambda a: changed(a, 0, 257), "keep.*0 to 256")],
    "mask_seed": [(lambda a: changed(a, 0, -5), "mask_seed")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "which"), [(n, i) for n, found in TENSORS.items() for i in range(len(found))]
)
def test_bad_columns_are_refused_by_name(name, which, parts):
    tensors, about, write = parts
    change, message = TENSORS[name][which]
    with pytest.raises(ArtifactError, match=message):
        trajectory.load(write(tensors | {name: change(tensors[name])}, about))


@pytest.mark.parametrize("name", sorted(set(trajectory._COLUMNS) - {"seeds", "steps", "best"}))
def test_missing_columns_are_named(name, parts):
    tensors, about, write = parts
    del tensors[name]
    with pytest.raises(ArtifactError, match=f"lacks `{name}`"):
        trajectory.load(write(tensors, about))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "edgesft.delta"}, "not a trajectory"),
        ({"version": 2}, "version 2.*knows 1"),
        ({"version": None}, "version None"),
        ({"steps": 10**12}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 5}, "steps"),
        ({"best": 7}, "best"),
        ({"best": None}, "no best step"),
        ({"measured": 3}, "expected 3|fit"),
        ({"measured": 10**9}, "measured"),
        ({"law": "uniform"}, "law"),
        ({"law": "low-rank"}, "law"),
        ({"rank": 3}, "rank"),
        ({"layers": []}, "no layer"),
        ({"layers": ["a", "a", "b"]}, "twice"),
        ({"layers": ["a", "b", "c\n"]}, "named"),
        ({"layers": ["a", "b", ""]}, "named"),
        ({"layers": ["a", "b", 3]}, "named"),
        ({"layers": ["a", "b"]}, "expected"),
        ({"settings": None}, "valid trajectory"),
        ({"settings": {"optimizer": "sgd"}}, "seed"),
        ({"settings": {"seed": 1, "optimizer": "lion"}}, "lion"),
        ({"settings": {"seed": 1, "weight_decay": math.nan}}, "weight_decay"),
        ({"settings": {"seed": 1, "dtype": "int3-32"}}, "int3-32"),
        ({"settings": {"seed": -1}}, "seed"),
        ({"settings": {"seed": 1, "colour": "red"}}, "colour"),
    ],
)
def test_bad_metadata_is_refused(change, message, parts):
    tensors, about, write = parts
    with pytest.raises(ArtifactError, match=message):
        trajectory.load(write(tensors, about | change))


@pytest.mark.parametrize("key", ["settings", "law", "rank", "measured", "steps", "best", "layers", "version"])
def test_missing_metadata_is_refused(key, parts):
    tensors, about, write = parts
    del about[key]
    with pytest.raises(ArtifactError, match=key):
        trajectory.load(write(tensors, about))


def test_a_stray_tensor_and_foreign_metadata_are_refused(parts):
    tensors, about, write = parts
    with pytest.raises(ArtifactError, match="extra"):
        trajectory.load(write(tensors | {"extra": np.zeros(3)}, about))
    for text in ("[]", "{", "1", '"x"'):
        file = write(tensors, about) / trajectory.FILE
        save_file(tensors, file, {"trajectory": text})
        with pytest.raises(ArtifactError, match="trajectory"):
            trajectory.load(file)
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match="not a trajectory"):
        trajectory.load(file)


def test_a_file_cut_anywhere_or_absent_is_refused(parts):
    tensors, about, write = parts
    file = write(tensors, about) / trajectory.FILE
    whole = file.read_bytes()
    for end in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(ArtifactError, match="truncated"):
            trajectory.load(file)
    file.unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        trajectory.load(file)


def test_flipped_bytes_never_end_in_another_error(parts):
    tensors, about, write = parts
    file = write(tensors, about) / trajectory.FILE
    whole, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 300).tolist():
        file.write_bytes(bytes(whole[:at]) + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
        with contextlib.suppress(ArtifactError):
            trajectory.load(file).updates()
