"""Times things beside each other: what the benchmarks share."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers


def compare(
    candidate: Callable[[], Any],
    reference: Callable[[], Any],
    rounds: int = 5,
    warmups: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    processor_clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """
    Times two functions by turns, in one process, so that whatever else the machine does slows both.

    Args:
        candidate (`Callable`): What is measured. On a GPU it has to end with a synchronisation.
        reference (`Callable`): What it is compared with.
        rounds (`int`, *optional*, defaults to 5): Rounds that are counted; every other one begins with the reference.
        warmups (`int`, *optional*, defaults to 1): Rounds before them that are not.
        clock (`Callable`, *optional*): Wall clock, in seconds.
        processor_clock (`Callable`, *optional*): Processor time of the process, in seconds.

    Returns:
        `dict[str, float]`: `seconds` and `reference_seconds`, the medians; `ratio`, the median of the rounds' ratios of
        candidate to reference; `processor_ratio`, the same by processor time, for a machine with other work.
    """
    functions = {"candidate": candidate, "reference": reference}
    walls: dict[str, list[float]] = {name: [] for name in functions}
    processors: dict[str, list[float]] = {name: [] for name in functions}
    # What is there before is not looked at each time
    gc.collect()
    gc.freeze()
    for number in range(warmups + rounds):
        for name in sorted(functions, reverse=number % 2 == 1):
            # What one leaves behind is not for the other to clear away
            gc.collect()
            start = clock(), processor_clock()
            functions[name]()
            seconds = clock() - start[0], processor_clock() - start[1]
            if number >= warmups:
                walls[name].append(seconds[0])
                processors[name].append(seconds[1])
    gc.unfreeze()
    return {
        "seconds": statistics.median(walls["candidate"]),
        "reference_seconds": statistics.median(walls["reference"]),
        "ratio": _median_ratio(**walls),
        "processor_ratio": _median_ratio(**processors),
    }


def _median_ratio(candidate: list[float], reference: list[float]) -> float:
    # A clock of coarse ticks can stand still
    return statistics.median(mine / max(theirs, 1e-9) for mine, theirs in zip(candidate, reference, strict=True))


def as_row(name: str, reference: str, timed: dict[str, float], target: float | None = None) -> dict[str, Any]:
    """
    A row of the table.

    Args:
        name (`str`): What was measured, with its sizes.
        reference (`str`): What it was compared with.
        timed (`dict[str, float]`): What [`compare`] returned.
        target (`float`, *optional*): The highest ratio that is good.
    """
    row = {"name": name, "reference": reference, **timed}
    return row if target is None else row | {"target": target}


def describe_machine(threads: int) -> dict[str, Any]:
    """What figures depend on: processor and GPU, threads, versions, date, and the load of other work."""
    cpu = _cpu_info()
    flags = cpu.get("flags", "").split()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg()[0],
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_instructions": [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo, which Linux alone has."""
    path = Path("/proc/cpuinfo")
    first = path.read_text(encoding="utf-8").split("\n\n")[0] if path.is_file() else ""
    pairs = [line.partition(":") for line in first.splitlines()]
    # On ARM the flags have another name
    return {{"Features": "flags"}.get(key.strip(), key.strip()): value.strip() for key, _, value in pairs}
