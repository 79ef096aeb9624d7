"""The arithmetic of the benchmarks, and both of them end to end on a tiny model."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgesft.cli import app

BENCH = Path(__file__).resolve().parents[1] / "bench"


def tool(name: str) -> ModuleType:
    """A benchmark as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_tools_{name}", BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


step_bench, quality, published = tool("test_zo_step"), tool("bench_zo_quality"), tool("published_mezo")


# ---------------------------------------------------------------- bench_zo_quality


def test_steps_to_a_value_lie_on_the_line_between_points() -> None:
    points = [(0, 0.5), (50, 0.6), (100, 0.9)]
    assert quality.steps_to(points, 0.75, upwards=True) == pytest.approx(75)
    assert quality.steps_to(points, 0.6, upwards=True) == 50
    assert quality.steps_to(points, 0.95, upwards=True) is None
    assert quality.steps_to([(0, 2.0), (10, 1.0)], 1.5, upwards=False) == pytest.approx(5)


def test_speed_up_is_to_the_last_value_of_the_slow_one() -> None:
    slow, fast = [(0, 0.5), (100, 0.7)], [(0, 0.5), (100, 0.9)]
    assert quality.speed_up(slow, fast, upwards=True) == pytest.approx(2)
    assert quality.speed_up(fast, slow, upwards=True) is None  # never gets there
    assert (
        quality.speed_up([(0, 0.5), (100, 0.4)], fast, upwards=True) is None
    )  # no progress to catch up with
    down = quality.speed_up([(0, 2.0), (90, 1.0)], [(0, 2.0), (30, 1.0)], upwards=False)
    assert down == pytest.approx(3)


def test_mean_curves_take_the_steps_that_all_runs_have() -> None:
    curves = [
        [{"step": 0, "x": 1.0}, {"step": 5, "x": 3.0}],
        [{"step": 0, "x": 2.0}, {"step": 5, "x": 5.0}, {"step": 9, "x": 0.0}],
    ]
    assert quality.mean_curve(curves, "x") == [(0, 1.5), (5, 4.0)]


def test_a_paired_difference_knows_that_the_examples_are_the_same() -> None:
    hard, easy = [0] * 50 + [1] * 50, [0] * 40 + [1] * 60
    mean, low, high = quality.paired([easy, easy], [hard])
    assert mean == pytest.approx(0.1)
    assert 0.03 < low < 0.1 < high < 0.17  # independent samples would span 0
    assert quality.paired([hard], [hard]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("accuracies", "met"),
    [((0.8, 0.7, 0.7), True), ((0.8, 0.7, 0.709), True), ((0.8, 0.7, 0.72), False), ((0.6, 0.7, 0.5), False)],
)
def test_the_bar_is_an_order_with_a_point_of_slack(accuracies: tuple[float, float, float], met: bool) -> None:
    lines = [{"method": m, "accuracy": a} for m, a in zip(quality.METHODS, accuracies, strict=True)]
    assert quality.bar(lines) is met
    assert quality.bar(lines[:2]) is None


def _settings(**other: Any) -> Any:
    values = {"model": "m", "steps": 2, "batch_size": 4, "eval_every": 1, "compute": "native"}
    return quality.Settings(**{**values, "noise": "gaussian", "threads": 1, **other})


def _put(work: Path, shared: Any, run: Any, loss: float | None, right: list[int]) -> None:
    folder = run.folder(work, shared)
    folder.mkdir(parents=True)
    result: dict[str, Any] = {**vars(run), "diverged": loss is None, "dev_loss": loss}
    if loss is not None:
        result["curve"] = [{"step": s, "dev_loss": loss, "dev_accuracy": 0.5} for s in (0, 2)]
        result["test"] = {"accuracy": sum(right) / len(right), "right": right}
        result["active_fraction"] = 0.25
    (folder / "result.json").write_text(json.dumps(result))


def test_the_rate_of_the_lowest_dev_loss_is_repeated_and_a_diverged_run_is_never_chosen(
    tmp_path: Path,
) -> None:
    shared = _settings()
    campaign = quality.Campaign(tmp_path, shared, ["sst2"], ["mezo"], [1e-5, 1e-4, 1e-3], [0, 1])
    for lr, loss in ((1e-5, 0.7), (1e-4, 0.6)):
        _put(tmp_path, shared, quality.Run("sst2", "mezo", lr, 0), loss, [1, 0])
    assert campaign.chosen("sst2", "mezo") is None  # one of the grid is missing
    assert campaign.missing() == ["sst2 mezo lr 0.001 seed 0"]
    _put(tmp_path, shared, quality.Run("sst2", "mezo", 1e-3, 0), None, [])
    assert campaign.chosen("sst2", "mezo") == 1e-4
    assert campaign.missing() == ["sst2 mezo lr 0.0001 seed 1"]
    other = quality.Campaign(tmp_path, _settings(steps=3), ["sst2"], ["mezo"], [1e-5], [0])
    assert other.missing() == ["sst2 mezo lr 1e-05 seed 0"]  # results of other settings do not count


def test_no_run_starts_when_the_time_is_up(tmp_path: Path) -> None:
    campaign = quality.Campaign(tmp_path, _settings(), ["sst2"], ["mezo"], [1e-5], [0], deadline=0.0)
    campaign.run()
    assert list(tmp_path.iterdir()) == []
    assert campaign.missing() == ["sst2 mezo lr 1e-05 seed 0"]


def test_quality_end_to_end_and_again_without_a_run(
    tmp_path: Path,
    tiny_model: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def inline(self: object, *arguments: str) -> Any:
        """In this process, which has torch loaded already."""
        capsys.readouterr()
        app([*arguments, "--json"], standalone_mode=False)
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(quality.Processes, "edgesft", inline)
    data = "--template '{text} It was' --label-word 0=a --label-word 1=b"
    asked = [
        "--model",
        tiny_model,
        "--tasks",
        tiny_data,
        "--methods",
        "mezo",
        "--lrs",
        "1e-4",
        "--seeds",
        "3",
    ]
    asked += ["--steps", "2", "--batch-size", "4", "--eval-every", "1", "--data-options", data]
    asked += ["--work", tmp_path / "work", "--out", tmp_path / "result.json"]
    arguments = [str(each) for each in asked]
    assert quality.main(arguments) == 1  # a bar of three methods cannot be met by one
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["missing"], found["failed"]) == ([], {})
    assert found["met"] == {str(tiny_data): None}
    (line,), (run,) = found["table"], found["runs"]
    assert line["accuracy"] == pytest.approx(run["test"]["accuracy"])
    assert line["interval"][0] <= line["accuracy"] <= line["interval"][1]
    assert [point["step"] for point in run["curve"]] == [0, 1, 2]
    assert "<svg" in (tmp_path / "result.svg").read_text()
    assert not list((tmp_path / "work").rglob("merged"))

    def none(*_: object) -> None:
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(quality.Processes, "edgesft", none)
    capsys.readouterr()
    quality.main(arguments)
    assert "mezo" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["table"] == found["table"]


def test_a_failing_process_is_told_with_what_it_said() -> None:
    with pytest.raises(quality.RunFailed, match=r"exit 3: .*`absent` does not exist"):
        quality.Processes().edgesft("tune", "absent", "absent", "-o", "nowhere")


def test_nothing_starts_after_a_stop() -> None:
    processes = quality.Processes()
    processes.stop()
    with pytest.raises(quality.RunFailed, match="stopped"):
        processes.edgesft("methods")


# ---------------------------------------------------------------- test_zo_step and published_mezo


def test_rounds_are_shuffled_and_slow_rows_rest() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or 0.0 for name in "abcdef"}
    samples = step_bench.interleaved(calls, 6, few=["f"])
    assert [("f" in sample) for sample in samples] == [True] * step_bench.FEW + [False] * 3
    assert order[:6] != order[6:12]
    assert sorted(order[:6]) == sorted(order[6:12]) == list("abcdef")
    assert step_bench.ratios([{"a": (3.0, 2.0), "b": (2.0, 4.0)}, {"b": (1.0, 1.0)}], "a", "b") == [1.5]


def test_a_row_is_judged_by_the_median_ratio_to_lean_passes() -> None:
    rows = [step_bench.Row("step", "ours", bar=1.1), step_bench.Row("two lean forwards", "lean")]
    samples = [
        {"step": (s, s), "two lean forwards": (2.0, 2.0), "two plain forwards": (4.0, 4.0)}
        for s in (2.0, 2.4, 9.0)
    ]
    line, lean = step_bench.summary(rows, samples)
    assert line["ratio"] == pytest.approx(1.2)
    assert line["ratio_to_plain"] == pytest.approx(0.6)
    assert (line["met"], lean["met"]) == (False, None)


@pytest.fixture(scope="module")
def batch() -> Any:
    import numpy as np

    windows = np.random.default_rng(0).integers(1, 256, (4, 8))
    return step_bench.full_batch(windows, np.array([7, 9]), np.array([0, 1, 1, 0]))


def _source(tiny_model: Path) -> Any:
    from edgesft.core import models

    return models.resolve(str(tiny_model))


def test_the_supervised_token_is_the_last_input_of_its_row(batch: Any) -> None:
    assert batch.input_ids[:, -1].tolist() == batch.targets.tolist() == [7, 9, 9, 7]
    assert (batch.input_ids.ravel()[batch.positions + 1] == batch.targets).all()
    assert batch.attention_mask.all()


@pytest.mark.parametrize("row", [*step_bench.TIMED, *step_bench.WEIGHED], ids=lambda row: row.name)
def test_every_row_of_the_step_bench_runs(row: Any, tiny_model: Path, batch: Any) -> None:
    import math

    step, model = step_bench.build(row, _source(tiny_model), batch)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert math.isfinite(step())
    moved = [name for name, p in model.named_parameters() if not p.equal(before[name])]
    changes = row.kind not in ("lean", "forward") and row.sets.get("base") != "int4"
    assert bool(moved) is changes  # quantised weights are no parameters
    if row.kind == "lora":
        assert all("lora_" in name for name in moved)


def test_published_mezo_follows_the_projected_gradient(tiny_model: Path, batch: Any) -> None:
    import torch

    from edgesft.core import models

    model, batches = models.load(tiny_model), batch.torch()
    before = [p.clone() for p in model.parameters()]
    lr, eps = 1e-3, 1e-3
    published.mezo(model, batches, eps=eps, lr=lr)()
    torch.manual_seed(0)  # the seed of its first step
    noise = [torch.normal(0.0, 1.0, size=p.shape) for p in before]
    change = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    z = torch.cat([n.flatten() for n in noise])
    g = -float(change @ z / (z @ z)) / lr
    torch.testing.assert_close(change, -lr * g * z, atol=3e-7, rtol=1e-3)  # less what +eps, -2 eps, +eps lose

    def at(scale: float) -> float:
        with torch.no_grad():
            for p, b, n in zip(model.parameters(), before, noise, strict=True):
                p.copy_(b + scale * n)
            return float(published.whole_loss(model, batches))

    assert g == pytest.approx((at(eps) - at(-eps)) / (2 * eps), rel=0.02, abs=0.02)
