"""What the benchmarks share: timing by turns, and the table."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu
import run
import timing


class Clock:
    """Stands still but for what is run, whose seconds are given call by call."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def function(self, name, seconds):
        remaining = iter(seconds)

        def run():
            self.calls.append(name)
            self.now += next(remaining)

        return run


def test_compare_takes_turns_and_the_median_of_ratios():
    clock, processor = Clock(), Clock()
    candidate, reference = clock.function("a", [100, 2, 30, 6]), clock.function("b", [1, 1, 10, 2])

    def with_processor(function, seconds):
        def run():
            function()
            processor.now += seconds

        return run

    timed = timing.compare(
        with_processor(candidate, 3), with_processor(reference, 4), 3, clock=clock, processor_clock=processor
    )
    # The first round is not counted; a slow one (30 beside 10) slows both
    assert timed == {"seconds": 6, "reference_seconds": 2, "ratio": 3, "processor_ratio": 0.75}
    assert "".join(clock.calls) == "ab" + "ba" + "ab" + "ba"


def test_the_ratio_is_not_that_of_the_medians():
    clock = Clock()
    candidate, reference = clock.function("a", [1, 2, 9]), clock.function("b", [1, 4, 3])
    timed = timing.compare(candidate, reference, rounds=3, warmups=0, clock=clock, processor_clock=clock)
    assert timed["seconds"] == 2 and timed["reference_seconds"] == 3 and timed["ratio"] == 1
    # Nothing else passed on this clock
    assert timed["processor_ratio"] == 1


def test_a_clock_that_stands_still_divides_by_no_zero():
    timed = timing.compare(lambda: None, lambda: None, clock=lambda: 5.0, processor_clock=lambda: 5.0)
    assert timed["ratio"] == 0 and timed["seconds"] == 0


def test_as_row():
    timed = {"seconds": 1.0, "reference_seconds": 2.0, "ratio": 0.5}
    assert timing.as_row("mine", "theirs", timed) == {"name": "mine", "reference": "theirs", **timed}
    assert timing.as_row("mine", "theirs", timed, target=0.75)["target"] == 0.75


def test_the_machine_is_described(tmp_path, monkeypatch):
    machine = timing.describe_machine(3)
    assert machine["threads"] == 3 and machine["processor"] and machine["memory_gib"] > 0.1
    text = "processor\t: 0\nmodel name\t: Fast 9000\nflags\t\t: sse avx512_bf16\n\nprocessor\t: 1\nmodel name\t: Slow\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(timing, "Path", lambda path: tmp_path / path.split("/")[-1])
    machine = timing.describe_machine(1)
    assert machine["processor"] == "Fast 9000" and machine["bfloat16_instructions"] == ["avx512_bf16"]
    (tmp_path / "cpuinfo").unlink()
    assert timing.describe_machine(1)["bfloat16_instructions"] == []


MACHINE = {
    "processor": "Fast 9000",
    "cores": 2,
    "memory_gib": 23.5,
    "instructions": "AVX512",
    "bfloat16_instructions": [],
    "threads": 2,
    "load_average": 0.25,
    "gpu": None,
    "python": "3.11",
    "torch": "2.13",
    "transformers": "5.23",
    "date": "2026-01-01T00:00:00+00:00",
}


def test_the_table():
    rows = [
        {"name": "layer", "reference": "dense | SwiGLU", "ratio": 1.30004, "target": 1.3}
        | {"seconds": 0.0123, "reference_seconds": 0.00946},
        {
            "name": "step",
            "reference": "plain",
            "ratio": 0.7,
            "target": 0.75,
            "seconds": 6.0,
            "reference_seconds": 8.571,
        },
        {"name": "pairs", "reference": "one by one", "ratio": 9, "target": 8, "at_least": True}
        | {"value": 1234.5, "reference_value": 137.2, "unit": "pairs/s"},
        {"name": "growth", "reference": "1,000", "ratio": 12},
    ]
    report = {"machine": MACHINE, "quick": False, "seconds": {"a": 60, "b": 90}, "failed": {"b": "OSError: gone"}}
    first, *lines = run.as_markdown(report | {"rows": rows}).splitlines()
    assert first.startswith(
        "Fast 9000, 2 cores, threads: 2, 24 GiB, AVX512, bfloat16 instructions: none, GPU: none; load"
    )
    assert first.endswith("2.5 minutes in all.")
    assert lines[3:] == [
        "| layer | dense \\| SwiGLU | 1.300 | ≤ 1.3 | **no** | 12.3 ms | 9.46 ms |",
        "| step | plain | 0.700 | ≤ 0.75 | yes | 6 s | 8.57 s |",
        "| pairs | one by one | 9.000 | ≥ 8 | yes | 1,234 pairs/s | 137.2 pairs/s |",
        "| growth | 1,000 | 12.000 |  |  |  |  |",
        "",
        "b failed: OSError: gone",
    ]


@pytest.mark.parametrize(
    ("ratio", "options", "expected"),
    [
        (1.1, {"target": 1.1}, True),
        (1.2, {"target": 1.1}, False),
        (7.9, {"target": 8, "at_least": True}, False),
        (8.0, {"target": 8, "at_least": True}, True),
        (0.0, {"target": 0}, True),
        (5.0, {}, None),
    ],
)
def test_a_target_is_met(ratio, options, expected):
    assert run.is_met({"ratio": ratio, **options}) is expected


class InThisProcess:
    """Stands for a pool of one process: importing torch anew takes seconds."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return False

    def submit(self, function, *args):
        self.call = lambda: function(*args)
        return self

    def result(self):
        return self.call()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Three benchmarks: one good, one that fails, one whose row lacks its ratio."""
    rows = [{"name": "quick {quick}", "reference": "r", "ratio": 0.5, "target": 1}]
    (tmp_path / "good_one.py").write_text(
        f"def measure(quick=False):\n    return [row | dict(name=str(quick)) for row in {rows}]\n"
    )
    (tmp_path / "bad_one.py").write_text("def measure(quick=False):\n    raise ValueError('no such shape')\n")
    (tmp_path / "empty_row.py").write_text("def measure(quick=False):\n    return [{'name': 'x', 'reference': 'y'}]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(run, "MODULES", ("good_one", "bad_one", "empty_row", "absent_one"))
    monkeypatch.setattr(run, "ProcessPoolExecutor", InThisProcess)
    return tmp_path


def test_a_failure_leaves_the_others_rows(modules, capsys):
    output = modules / "out"
    options = ["--quick", "--threads", "1", "--output_dir", str(output), "--modules"]
    assert run.main([*options, "bad_one", "empty_row", "good_one"]) == 1
    report = json.loads((output / "benchmark.json").read_text())
    assert report["rows"] == [{"module": "good_one", "name": "True", "reference": "r", "ratio": 0.5, "target": 1}]
    assert report["failed"]["bad_one"] == "ValueError: no such shape"
    assert "lacks ['ratio']" in report["failed"]["empty_row"]
    assert report["machine"]["threads"] == 1 and set(report["seconds"]) == {"bad_one", "empty_row", "good_one"}
    table = (output / "benchmark.md").read_text()
    assert "| True | r | 0.500 | ≤ 1 | yes |" in table and "bad_one failed: ValueError" in table
    assert table == capsys.readouterr().out
    assert run.main([*options, "good_one"]) == 0


def test_an_absent_module_is_named_before_anything_runs(modules):
    with pytest.raises(SystemExit, match=r"Expected absent_one\.py beside run\.py, but there is no such file"):
        run.main(["--output_dir", str(modules / "out"), "--modules", "good_one", "absent_one"])
    assert not (modules / "out").exists()


# At small shapes: each check is whole, and what it compares agrees on a CPU too
@pytest.mark.parametrize("check", gpu.CHECKS)
def test_gpu_checks_on_a_cpu(check):
    if check == "qlora":
        pytest.importorskip("bitsandbytes", reason="needs the extra quantization")
    if torch.cuda.is_available():
        pytest.skip("`make gpu-check` runs them at full size here")
    rows = getattr(gpu, check)(quick=True)
    assert bool(rows) == (check != "host_waits")
    assert all({"name", "reference", "ratio"} <= set(row) for row in rows)
    missed = [row["name"] for row in rows if run.is_met(row) is False]
    assert not missed


def test_a_check_that_hangs_or_crashes_hides_no_other(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time\n\ndef measure(quick=False):\n    time.sleep(60)\n")
    (tmp_path / "works.py").write_text(
        "def measure(quick=False):\n    return [dict(name='a', reference='b', ratio=1.0)]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(run.__file__).parent}")
    monkeypatch.syspath_prepend(tmp_path)
    report = run.run_modules(["hangs:measure", "works:measure"], True, 1, tmp_path, seconds=1)
    assert list(report["failed"]) == ["hangs:measure"] and [row["module"] for row in report["rows"]] == [
        "works:measure"
    ]
