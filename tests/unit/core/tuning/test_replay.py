import hashlib
import math
import subprocess
import sys

import numpy as np
import pytest

from edgesft.core import catalog
from edgesft.core.errors import ArtifactError
from edgesft.core.protocols import Mask, Shift
from edgesft.core.tuning.replay import Arrays, Replay
from edgesft.core.tuning.scalar_optim import Measured
from edgesft.core.tuning.schedule import derive
from edgesft.core.tuning.trajectory import Settings, Trajectory
from edgesft.kernels import perturb

SHAPES = {"b.q": (5, 13), "a.q": (17, 3), "a.k": (4, 4)}
MASKS = {"b.q": Mask(), "a.q": Mask(high=0.5), "a.k": Mask(low=0.01, keep=128, seed=3)}


class Plain(Arrays):
    """Noise of numpy's own generator: what is replayed where, not how."""

    def replay(self, held, updates, *, tensor, mask):
        for update in updates:
            size = np.abs(held)
            inside = (size >= mask.low) & (size <= mask.high)
            total = np.float32(0)
            for shift in update.shifts:
                z = np.random.Generator(np.random.Philox(key=[shift.seed, tensor])).standard_normal(
                    held.shape, dtype=np.float32
                )
                total = total + np.float32(shift.scale) * z
            held[inside] = (np.float32(update.shrink) * held + total)[inside]


def base_of(name):
    rng = np.random.default_rng(derive(name) % 1000)
    found = rng.standard_normal(SHAPES[name], dtype=np.float32)
    found.flat[:8] = [0.0, -0.0, 1e-45, -1e-40, 1e30, 0.5, np.nextafter(np.float32(0.5), 1), -3e-8]
    return found


def measured_of(numbers, law="gaussian", directions=1):
    return [
        Measured(
            step,
            1e-3 * (step + 1) / 7,
            tuple(
                Shift(derive(derive(1, "step", step), i), math.sin(step + i) * 10 ** (step % 5), law, 0)
                for i in range(directions)
            ),
        )
        for step in numbers
    ]


def digest(array):
    return hashlib.sha256(array.tobytes()).digest()


def tuned(measured, machine, *, steps, best, optimizer="adam", decay=0.1):
    """A run taken step by step, as training does, and its weights after each step."""
    settings = Settings(seed=1, optimizer=optimizer, weight_decay=decay)
    draft = Trajectory(settings=settings, layers={}, measured=measured, steps=steps)
    held = {name: base_of(name) for name in SHAPES}
    after = {0: {name: w.copy() for name, w in held.items()}}
    for count, update in enumerate(draft.updates(), 1):
        for name, w in held.items():
            tensor = perturb.tensor_id(f"{name}.weight")
            machine.replay(w, [update], tensor=tensor, mask=MASKS[name])
        after[measured[count - 1].step + 1] = {name: w.copy() for name, w in held.items()}
    hashes = {step: {n: digest(w) for n, w in weights.items()} for step, weights in after.items()}
    run = Trajectory.of(
        settings,
        measured,
        shapes=SHAPES,
        masks=MASKS,
        base=hashes[0],
        final=hashes[max(hashes)],
        steps=steps,
        best=best,
        best_digests=hashes[best],
    )
    return run, after


@pytest.fixture(scope="module")
def plain():
    return tuned(measured_of([0, 1, 2, 4, 5, 6, 7, 8]), Plain(), steps=10, best=5)


@pytest.mark.parametrize(
    ("step", "like"), [("last", 9), ("best", 5), (0, 0), (1, 1), (3, 3), (4, 3), (8, 8), (9, 9), (10, 9)]
)
def test_a_replay_ends_where_training_was(step, like, plain):
    run, after = plain
    replay = Replay(run, step)
    for name in reversed(SHAPES):
        base = base_of(name)
        found = replay.run(name, base, Plain())
        assert found is base, "in place"
        assert found.tobytes() == after[like][name].tobytes()
    assert replay.verified
    assert replay.steps == run.at(step)
    assert replay.seconds > 0


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
@pytest.mark.parametrize("optimizer", ["sgd", "sign", "adam"])
def test_real_noise_replays_bit_for_bit(law, optimizer):
    """`replay` of the host, all steps in one sweep, against its `descend` step by step."""
    host = catalog.runtime("kernels.perturb.host")

    class Stepwise(Arrays):
        def replay(self, held, updates, *, tensor, mask):
            for update in updates:
                host.descend(
                    held,
                    shifts=update.shifts,
                    tensor=tensor,
                    mask=mask,
                    shrink=update.shrink,
                    rounding=update.rounding,
                )

    measured = measured_of(range(6), law, directions=2)
    run, after = tuned(measured, Stepwise(), steps=6, best=3, optimizer=optimizer)
    for step in ("last", "best", 5):
        replay = Replay(run, step)
        for name in SHAPES:
            found = replay.run(name, base_of(name))
            assert found.tobytes() == after[run.at(step)][name].tobytes()
            assert found.tobytes() != base_of(name).tobytes()
        assert replay.verified


def test_another_base_is_refused_with_both_hashes(plain):
    run, _ = plain
    other = base_of("a.q")
    other[3, 1] = np.nextafter(other[3, 1], np.float32(9))
    with pytest.raises(ArtifactError) as caught:
        Replay(run, source="out/zo").run("a.q", other.copy(), Plain())
    for expected in (digest(other), run.layers["a.q"].base):
        assert f"sha256:{expected.hex()[:12]}" in caught.value.message
    assert "`a.q`" in caught.value.message
    assert "`out/zo`" in caught.value.message
    assert caught.value.hint


def test_another_base_may_be_allowed_and_is_then_not_verified(plain):
    run, after = plain
    replay = Replay(run, allow_other_base=True)
    replay.run("b.q", base_of("b.q"), Plain())
    assert replay.verified, "these are the right weights"
    other = base_of("a.k")
    other[2, 2] += 1
    found = replay.run("a.k", other, Plain())
    assert not replay.verified
    assert found[2, 2] != after[9]["a.k"][2, 2]
    replay.run("a.q", base_of("a.q"), Plain())
    assert not replay.verified, "one is enough"


@pytest.mark.parametrize("step", ["last", "best", 2])
def test_a_wrong_result_is_never_given(step, plain):
    """Arithmetic that is off in the last bit of one entry, once."""
    run, _ = plain

    class Faulty(Plain):
        def replay(self, held, updates, *, tensor, mask):
            super().replay(held, updates, tensor=tensor, mask=mask)
            held[1, 1] = np.nextafter(held[1, 1], np.float32(np.inf))

    with pytest.raises(ArtifactError, match=r"`b\.q`.*sha256:.*sha256:"):
        Replay(run, step).run("b.q", base_of("b.q"), Faulty())
    correct = Replay(run, step)
    with pytest.raises(ArtifactError, match=r"\[5, 12\].*\[5, 13\]"):
        correct.run("b.q", base_of("b.q")[:, :-1].copy(), Plain())


def test_an_altered_gradient_is_found_out(plain):
    run, _ = plain
    measured = list(run.measured)
    shift = measured[3].shifts[0]
    measured[3] = Measured(4, measured[3].lr, (Shift(shift.seed, shift.scale * 1.01, shift.law),))
    altered = Trajectory(
        settings=run.settings, layers=run.layers, measured=measured, steps=run.steps, best=run.best
    )
    for step in ("last", "best", 2):
        with pytest.raises(ArtifactError, match="replay"):
            Replay(altered, step).run("b.q", base_of("b.q"), Plain())


def test_a_run_without_a_hash_of_its_best_step_is_proved_by_its_end(plain):
    run, after = plain
    bare = Trajectory.of(
        run.settings,
        run.measured,
        shapes=SHAPES,
        masks=MASKS,
        base={n: layer.base for n, layer in run.layers.items()},
        final={n: layer.final for n, layer in run.layers.items()},
        steps=run.steps,
        best=5,
    )
    assert Replay(bare, "best").run("a.q", base_of("a.q"), Plain()).tobytes() == after[5]["a.q"].tobytes()


def test_steps_that_the_kernels_refuse_are_the_files_fault(plain):
    run, _ = plain
    endless = [Measured(0, 9.0, (Shift(1, 1e308),))]
    for measured, masks, message in (
        (endless, MASKS, "finite"),
        (measured_of([0], "low-rank"), dict.fromkeys(SHAPES, Mask()), "rank"),
    ):
        broken = Trajectory.of(
            Settings(seed=1),
            measured,
            shapes=SHAPES,
            masks=masks,
            base={n: layer.base for n, layer in run.layers.items()},
            final={n: layer.final for n, layer in run.layers.items()},
            steps=1,
        )
        with pytest.raises(ArtifactError, match=f"cannot be replayed on `b.q`.*{message}"):
            Replay(broken).run("b.q", base_of("b.q"))


def test_a_replay_needs_no_torch(tmp_path):
    base, measured = np.ones((4, 8), dtype=np.float32), measured_of([0, 1])
    draft = Trajectory(settings=Settings(seed=1), layers={}, measured=measured, steps=2)
    final = base.copy()
    catalog.runtime("kernels.perturb.host").replay(
        final, draft.updates(), tensor=perturb.tensor_id("a.weight"), mask=Mask()
    )
    Trajectory.of(
        draft.settings,
        measured,
        shapes={"a": (4, 8)},
        masks={"a": Mask()},
        base={"a": digest(base)},
        final={"a": digest(final)},
        steps=2,
    ).save(tmp_path)
    code = (
        "import sys; from pathlib import Path; import numpy as np;"
        "from edgesft.core.tuning import replay, trajectory;"
        "run = replay.Replay(trajectory.load(Path(sys.argv[1])));"
        "run.run('a', np.ones((4, 8), dtype=np.float32)); assert run.verified;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, timeout=120)
