"""The CI kit does what it says: its lines are taken out of the YAML files and run in bash, as a runner would.

Most tests run them against a stand-in for `edgesft` that records its arguments and answers as it is told;
those with `real` run the command itself on a tiny export.
"""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ACTION = ROOT / "action.yml"
WORKFLOW = ROOT / "examples" / "latency-gate.yml"
GITLAB = ROOT / "examples" / "gitlab-ci.yml"
OURS = "edgesft/edgesft@"
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
EVIL = "x'; touch INJECTED; $(touch INJECTED) `touch INJECTED` \" --json\n::set-output name=a::b"

STAND_IN = """#!{python}
import json, os, pathlib, sys
home = pathlib.Path({home!r})
arguments = sys.argv[1:]
with open(home / "calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + "\\n")
answers = json.loads((home / "answers.json").read_text())
command = arguments[0]
if command in ("export", "gate", "report"):
    out = pathlib.Path(arguments[arguments.index("-o") + 1])
answer = answers.get(command, {{}})
if command == "export":
    out.mkdir(parents=True)
if command == "calibrate":
    folder = pathlib.Path(os.environ["EDGESFT_CALIBRATIONS"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "here.json").write_text("{{}}")
if command == "gate":
    print("gate: 8/8", file=sys.stderr)
    if answer.get("record"):
        print(json.dumps(answer["record"]))
    if answer.get("sealed"):
        out.mkdir(parents=True)
        (out / "manifest.json").write_text("{{}}")
if command == "report":
    assert (pathlib.Path(arguments[1]) / "manifest.json").exists()
    out.mkdir(parents=True)
    (out / "summary.md").write_text("# verdict\\n")
    (out / "github.txt").write_text("::notice title=EdgeSFT::the gate\\n")
    (out / "junit.xml").write_text("<testsuites/>")
    (out / "results.sarif").write_text("{{}}")
if answer.get("says"):
    print(answer["says"], file=sys.stderr)
sys.exit(answer.get("code", 0))
"""


def executable(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


class Bench:
    """A runner's machine: a working folder, tools on the path, the files that steps write to."""

    def __init__(self, folder):
        self.folder, self.home, self.tools = folder / "work", folder / "home", folder / "bin"
        for each in (self.folder, self.home, self.tools, folder / "tmp"):
            each.mkdir(parents=True)
        executable(self.tools / "python3", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("GITHUB_", "CI_", "EDGESFT_"))},
            "PATH": f"{self.tools}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(self.home),
            "RUNNER_TEMP": str(folder / "tmp"),
            "RUNNER_TOOL_CACHE": str(self.home / "tools"),
            "GITHUB_ACTION_PATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        self.github = {n: folder / n.lower() for n in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        self.log = ""

    def stand_in(self, **answers):
        (self.home / "answers.json").write_text(json.dumps(answers))
        executable(self.tools / "edgesft", STAND_IN.format(python=sys.executable, home=str(self.home)))

    def real(self):
        executable(
            self.tools / "edgesft",
            f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m edgesft "$@"\n',
        )

    @property
    def calls(self):
        file = self.home / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def called(self, command):
        return [call for call in self.calls if call[0] == command]

    def bash(self, script, env=None, options=("--noprofile", "--norc", "-eo", "pipefail")):
        """Run a script the way runners do; returns the exit code."""
        file = self.home / "script.sh"
        file.write_text(script)
        github = {k: str(v) for k, v in self.github.items()}
        done = subprocess.run(
            ["bash", *options, str(file)],
            cwd=self.folder,
            env={**self.env, **github, **(env or {})},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        self.log += done.stdout + done.stderr
        return done.returncode

    def outputs(self):
        """What the last step wrote to GITHUB_OUTPUT, which is emptied."""
        file = self.github["GITHUB_OUTPUT"]
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return dict(line.split("=", 1) for line in lines)

    @property
    def summary(self):
        file = self.github["GITHUB_STEP_SUMMARY"]
        return file.read_text() if file.exists() else ""


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "bench")


def fill(text, values):
    """Replace `${{ name }}` by its value."""
    return EXPRESSION.sub(lambda m: values[m[1]], str(text))


def holds(condition, values, failed, folder):
    """Whether a step runs: the few forms of `if` that the files use. None: unless a step before failed."""
    parts = [p.strip() for p in EXPRESSION.sub(r"\1", condition or "").split("&&") if p.strip()]
    if failed and "always()" not in parts:
        return False
    for part in parts:
        if match := re.fullmatch(r"hashFiles\('(.+)'\) != ''", part):
            if not (folder / match[1]).exists():
                return False
        elif match := re.fullmatch(r"(\S+) != '(.*)'", part):
            if values[match[1]] == match[2]:
                return False
        else:
            assert part == "always()", f"an unknown condition: {part}"
    return True


def act(bench, **given):
    """Run the steps of action.yml; returns its outputs and the exit code of the first step that failed."""
    action = yaml.safe_load(ACTION.read_text())
    assert given.keys() <= action["inputs"].keys()
    values = {f"inputs.{k}": str(given.get(k, v.get("default", ""))) for k, v in action["inputs"].items()}
    failed = 0
    for step in action["runs"]["steps"]:
        if not holds(step.get("if"), values, failed, bench.folder):
            continue
        env = {k: fill(v, values) for k, v in step.get("env", {}).items()}
        failed = bench.bash(step["run"], env) or failed
        for key, value in bench.outputs().items():
            values[f"steps.{step.get('id')}.outputs.{key}"] = value
    found = {}
    for name, about in action["outputs"].items():
        key = EXPRESSION.fullmatch(about["value"])[1]
        found[name] = values.get(key, "")
    return found, failed


def scripts():
    """(where, text) of everything that a shell runs in the kit."""
    for step in yaml.safe_load(ACTION.read_text())["runs"]["steps"]:
        yield f"action: {step['name']}", step["run"]
    for name, job in yaml.safe_load(WORKFLOW.read_text())["jobs"].items():
        for step in job["steps"]:
            if "run" in step:
                yield f"workflow: {name}: {step['name']}", step["run"]
    for name, job in yaml.safe_load(GITLAB.read_text()).items():
        yield f"gitlab: {name}", "\n".join(job["script"])


@pytest.mark.parametrize(("where", "text"), [pytest.param(*s, id=s[0]) for s in scripts()])
def test_no_expression_stands_in_a_script_and_bash_can_read_it(where, text, tmp_path):
    assert "${{" not in text, where
    assert "eval" not in text.split()
    file = tmp_path / "script.sh"
    file.write_text(text)
    subprocess.run(["bash", "-n", str(file)], check=True)


def test_every_input_is_documented_used_and_reaches_the_shell_by_the_environment():
    action = yaml.safe_load(ACTION.read_text())
    used = set(re.findall(r"inputs\.([a-z-]+)", ACTION.read_text()))
    assert used == action["inputs"].keys()
    assert all(i["description"] and ("default" in i or i["required"]) for i in action["inputs"].values())
    assert {"verdict", "ratio"} <= action["outputs"].keys()
    for step in action["runs"]["steps"]:
        assert step["shell"] == "bash"
        names = set(re.findall(r"\$\{?([A-Z][A-Z_]*)", step["run"]))
        runner = {"HOME", *(n for n in names if n.startswith(("GITHUB_", "RUNNER_")))}
        assert names <= {*step.get("env", {}), *runner}


RECORD = {"verdict": "pass", "ratio": 1.00123}
VERDICTS = [
    (0, {"verdict": "pass", "ratio": 1.00123}, True, "pass", "1.0012"),
    (10, {"verdict": "fail", "ratio": 1.2}, True, "fail", "1.2000"),
    (11, {"verdict": "inconclusive", "ratio": 1.03}, True, "inconclusive", "1.0300"),
    (12, {"verdict": "not_comparable", "ratio": None}, False, "not_comparable", ""),
    (13, {"verdict": "nothing_measured", "ratio": None}, False, "nothing_measured", ""),
    (14, {"verdict": "device_lost", "ratio": 1.01}, False, "device_lost", "1.0100"),
    (3, None, False, "error", ""),
    (70, {"verdict": "pass\nverdict=fail", "ratio": "1"}, False, "error", ""),
]


@pytest.mark.parametrize(("code", "record", "sealed", "verdict", "ratio"), VERDICTS)
def test_the_action_passes_on_every_verdict(bench, code, record, sealed, verdict, ratio):
    bench.stand_in(gate={"code": code, "record": record, "sealed": sealed, "says": "error: `::stop`, said"})
    outputs, failed = act(bench, base="out/base", head="out/head")
    assert failed == code
    assert (outputs["verdict"], outputs["ratio"], outputs["exit-code"]) == (verdict, ratio, str(code))
    assert "gate: 8/8" in bench.log
    if sealed:
        assert bench.summary == "# verdict\n"
        assert "::notice title=EdgeSFT::the gate" in bench.log
        assert (Path(outputs["out"]) / "report" / "junit.xml").exists()
    else:
        assert f"no verdict (exit {code})" in bench.summary
        assert "    error: `::stop`, said" in bench.summary
        assert "::error title=EdgeSFT gate::" in bench.log
        assert not bench.called("report")


def test_options_are_passed_only_where_they_are_given(bench):
    bench.stand_in(gate={"record": RECORD, "sealed": True})
    _, failed = act(bench, base="b", head="h", calibrate="never")
    assert failed == 0
    (call,) = bench.called("gate")
    assert call[:4] == ["gate", "--head=h", "--base=b", "--inconclusive=report"]
    assert [c[0] for c in bench.calls] == ["gate", "report"]
    more = {"budget": "b.toml", "margin": "3", "metric": "ttft", "max-pairs": "16", "threads": "2"}
    more |= {"device": "ssh://u@h:2222", "inconclusive": "fail", "formats": "", "out": "kept"}
    outputs, _ = act(bench, head="h", **more)
    call = bench.called("gate")[-1]
    assert {
        *("--head=h", "--budget=b.toml", "--margin=3", "--metric=ttft", "--max-pairs=16", "--threads=2"),
        *("--device=ssh://u@h:2222", "--inconclusive=fail"),
    } < set(call)
    assert not [a for a in call if a.startswith("--base")]
    assert bench.called("report")[-1][2:4] == ["--format", "markdown,github"]
    assert outputs["out"] == "kept"
    (calibration,) = bench.called("calibrate")
    assert calibration == [
        *("calibrate", "--days=30", "--if-needed", "--margin=3", "--metric=ttft", "--threads=2"),
        *("--device=ssh://u@h:2222", "--", "h"),
    ]


def test_calibrates_only_when_needed_unless_told_otherwise(bench):
    bench.stand_in(gate={"record": RECORD, "sealed": True})
    for calibrate, needed in (("auto", True), ("always", False)):
        assert act(bench, base="b", head="h", calibrate=calibrate)[1] == 0
        assert ("--if-needed" in bench.called("calibrate")[-1]) == needed
    count = len(bench.called("calibrate"))
    act(bench, base="b", head="h", calibrate="never")
    assert len(bench.called("calibrate")) == count
    act(bench, base="b", head="h", calibrations=str(bench.folder / "mine"))
    assert (bench.folder / "mine" / "here.json").exists()


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (1, 0), (3, 3), (13, 13)])
def test_a_machine_too_noisy_warns_and_any_other_failure_ends_it(bench, code, ends):
    bench.stand_in(calibrate={"code": code}, gate={"record": RECORD, "sealed": True})
    assert act(bench, base="b", head="h")[1] == ends
    assert ("::warning" in bench.log) == (code == 1)
    assert bool(bench.called("gate")) == (ends == 0)


@pytest.mark.parametrize("name", ["base", "head", "budget", "margin", "metric", "device", "threads", "out"])
def test_no_input_is_ever_run_as_a_command(bench, name):
    bench.stand_in(gate={"record": RECORD, "sealed": True})
    value = EVIL.replace("/", "") if name == "out" else EVIL
    outputs, failed = act(bench, **{"base": "b", "head": "h", name: value})
    assert not list(bench.folder.rglob("*INJECTED"))
    assert outputs.keys() == {"verdict", "ratio", "exit-code", "out"}
    if name != "out":
        assert failed == 0
        (call,) = bench.called("gate")
        assert f"--{name}={value}" in call


def test_installs_only_where_there_is_none(bench):
    pip = f'#!/bin/sh\necho "$@" > "{bench.home}/pip"\ncp "{bench.home}/edgesft" "{bench.tools}/edgesft"\n'
    bench.stand_in(gate={"record": RECORD, "sealed": True})
    python = (bench.tools / "python3").read_text()
    executable(
        bench.tools / "python3", pip + 'case "$1" in -m) ;; *) ' + python.splitlines()[1] + " ;; esac\n"
    )
    shutil.copy(bench.tools / "edgesft", bench.home / "edgesft")
    install = yaml.safe_load(ACTION.read_text())["runs"]["steps"][0]["run"]
    assert bench.bash(install, {"INSTALL": ""}) == 0
    assert not (bench.home / "pip").exists()
    (bench.tools / "edgesft").unlink()
    assert bench.bash(install, {"INSTALL": ""}) == 0
    assert (bench.home / "pip").read_text().split() == ["-m", "pip", "install", "--", str(ROOT)]
    assert bench.bash(install, {"INSTALL": "edgesft==0.1.0"}) == 0
    assert (bench.home / "pip").read_text().split()[-1] == "edgesft==0.1.0"


def workflow(bench):
    """Run the jobs' own steps and our action of the workflow; returns the exit code of the job."""
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    env = {k: str(v) for k, v in job["env"].items()}
    github = {"github.token": "secret", "github.event.pull_request.html_url": "https://example.org/pull/7"}
    failed = 0
    for step in job["steps"]:
        if not holds(step.get("if"), github, failed, bench.folder):
            continue
        if "run" in step:
            own = {k: fill(v, github) for k, v in step.get("env", {}).items()}
            failed = bench.bash(step["run"], {**env, **own}) or failed
        elif step["uses"].startswith(OURS):
            bench.env |= env
            failed = act(bench, **step["with"])[1] or failed
    return failed


@pytest.mark.parametrize(("code", "sealed"), [(0, True), (10, True), (11, True), (12, False)])
def test_the_workflow_builds_gates_and_comments(bench, code, sealed):
    bench.stand_in(gate={"code": code, "record": RECORD, "sealed": sealed})
    executable(bench.tools / "gh", f'#!/bin/sh\necho "$GH_TOKEN $@" > "{bench.home}/gh"\n')
    assert workflow(bench) == code
    assert [c[0] for c in bench.calls][:4] == ["export", "export", "calibrate", "gate"]
    assert bench.called("export")[0][1] == "base/models/merged"
    comment = bench.home / "gh"
    assert comment.exists() == sealed
    if sealed:
        said = comment.read_text().split()
        assert said[:4] == ["secret", "pr", "comment", "https://example.org/pull/7"]
        assert (bench.folder / said[said.index("--body-file") + 1]).read_text() == "# verdict\n"
        assert (bench.folder / "out/gate/report/results.sarif").exists()


def test_the_workflow_uses_inputs_that_the_action_has():
    inputs = yaml.safe_load(ACTION.read_text())["inputs"]
    (job,) = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    (step,) = [s for s in job["steps"] if s.get("uses", "").startswith(OURS)]
    assert step["with"].keys() <= inputs.keys()
    ids = {s["id"] for s in job["steps"] if "id" in s}
    assert set(re.findall(r"steps\.([a-z-]+)\.", WORKFLOW.read_text())) <= ids


def repository(bench, model=None):
    """A repository with two versions of models/merged as the working folder; returns the first commit."""

    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
        return subprocess.run(
            ["git", *author, *arguments],
            cwd=bench.folder,
            env=bench.env,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    merged = bench.folder / "models" / "merged"
    merged.mkdir(parents=True)
    if model is not None:
        shutil.copytree(model, merged, dirs_exist_ok=True)
    (merged / "note.txt").write_text("base")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "base")
    base = git("rev-parse", "HEAD")
    (merged / "note.txt").write_text("head")
    git("commit", "--quiet", "-am", "head")
    return base


def gitlab(bench, base):
    (job,) = yaml.safe_load(GITLAB.read_text()).values()
    env = {**{k: str(v) for k, v in job["variables"].items()}, "CI_MERGE_REQUEST_DIFF_BASE_SHA": base}
    return bench.bash("\n".join(job["script"]), env, options=("-eo", "pipefail"))


@pytest.mark.parametrize(("code", "sealed"), [(0, True), (10, True), (11, True), (12, False)])
def test_the_gitlab_job_builds_gates_and_leaves_junit(bench, code, sealed):
    bench.stand_in(gate={"code": code, "record": RECORD, "sealed": sealed})
    base = repository(bench)
    assert gitlab(bench, base) == code
    assert [c[0] for c in bench.calls][:4] == ["export", "export", "calibrate", "gate"]
    assert (bench.folder / "base" / "models" / "merged" / "note.txt").read_text() == "base"
    (job,) = yaml.safe_load(GITLAB.read_text()).values()
    assert json.loads((bench.folder / "out" / "verdict.json").read_text()) == RECORD
    assert (bench.folder / job["artifacts"]["reports"]["junit"]).exists() == sealed
    assert ("# verdict" in bench.log) == sealed


@pytest.mark.parametrize(("code", "ends"), [(1, 0), (3, 3), (14, 14)])
def test_the_gitlab_job_goes_on_only_when_a_calibration_is_just_not_armed(bench, code, ends):
    bench.stand_in(calibrate={"code": code}, gate={"record": RECORD, "sealed": True})
    assert gitlab(bench, repository(bench)) == ends
    assert bool(bench.called("gate")) == (ends == 0)


def test_the_gitlab_job_runs_again_in_a_folder_that_was_cleaned(bench):
    bench.stand_in(gate={"record": RECORD, "sealed": True})
    (bench.home / ".cache" / "edgesft-calibrations").mkdir(parents=True)
    base = repository(bench)
    assert gitlab(bench, base) == 0
    for name in ("base", "out"):
        shutil.rmtree(bench.folder / name)
    assert gitlab(bench, base) == 0
    assert all("--if-needed" in call for call in bench.called("calibrate"))


def test_the_example_files_are_what_their_commands_read():
    from edgesft.stages import fleet
    from edgesft.stages.gating import budget

    limits, level = budget.read(ROOT / "examples" / "budget.toml")
    assert {"tpot_p50_ms", "size_mb"} < limits.keys()
    assert 0.5 < level < 1
    assert [m.name for m in fleet.load(ROOT / "examples" / "fleet.toml")] == ["bench", "nano", "pi"]


# ---- against the command itself


def options_of(script):
    """(command, option) of every call of edgesft in a script, arrays of options included."""
    for match in re.finditer(r"\bedgesft ([a-z]+)((?:[^\n;|}]|\\\n)*)", script):
        for option in re.findall(r"(?<!\S)(--?[a-z][a-z-]*|-o)\b", match[2].split(" 2>")[0]):
            yield match[1], option
        if "options[@]" in match[2]:
            for option in re.findall(r"\"(--[a-z-]+)=", script):
                yield match[1], option


def test_real_commands_have_every_option_that_the_kit_uses(cli):
    wanted: dict[str, set[str]] = {}
    texts = [text for _, text in scripts()]
    texts += re.findall(r"```[a-z]*\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)
    for text in texts:
        for command, option in options_of(text):
            wanted.setdefault(command, set()).add(option)
    assert {"gate", "calibrate", "report", "export"} <= wanted.keys()
    missing = []
    for command, names in wanted.items():
        if command == "baseline":
            continue
        shown = cli(command, "--help").stdout
        missing += [f"{command} {n}" for n in sorted(names) if re.search(rf"(?<!\S){n}\b", shown) is None]
    assert missing == []


@pytest.fixture(scope="module")
def exported(cli, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("kit") / "exported"
    cli("export", tiny_model, "--target", "onnx", "-o", out)
    return out


def test_real_gate_passes_through_the_action(bench, exported):
    bench.real()
    given = {"base": exported, "head": exported, "max-pairs": 8, "inconclusive": "pass", "calibrate": "never"}
    outputs, failed = act(bench, **given, threads=1, out="out")
    assert failed == 0, bench.log
    assert outputs["verdict"] in ("pass", "inconclusive")
    assert 0.3 < float(outputs["ratio"]) < 3
    report = bench.folder / "out" / "report"
    assert {p.name for p in report.iterdir()} == {"summary.md", "github.txt", "junit.xml", "results.sarif"}
    assert bench.summary == (report / "summary.md").read_text()


def test_real_gate_of_nothing_is_an_error_with_its_exit_code(bench, exported):
    bench.real()
    outputs, failed = act(bench, base=exported, head="nowhere", calibrate="never")
    assert failed == 3
    assert (outputs["verdict"], outputs["exit-code"]) == ("error", "3")
    assert "`nowhere` does not exist" in bench.summary


def test_real_gate_of_two_kinds_is_not_comparable(bench, exported, tiny_model):
    bench.real()
    outputs, failed = act(bench, base=exported, head=tiny_model, calibrate="never", threads=1)
    assert failed == 12, bench.log
    assert outputs["verdict"] == "not_comparable"
    assert "base is of kind `onnx`, head of kind `model`" in bench.summary


@pytest.mark.slow
def test_real_gitlab_job_with_calibration(bench, tiny_model):
    bench.real()
    assert gitlab(bench, repository(bench, tiny_model)) in (0, 11, 12), bench.log
    assert (bench.folder / "out" / "verdict.json").stat().st_size > 0
