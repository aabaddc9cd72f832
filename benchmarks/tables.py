"""What every benchmark does alike: time a function, measure its memory in a process of its own, print and write one table.

python -m benchmarks.tables     # print the README's speed table, from benchmarks/results/*.json
"""

import json
import multiprocessing
import platform
import re
import time
from pathlib import Path

import torch

from utils.jsonl import write_whole
from utils.runs import versions

RESULTS = Path(__file__).parent / "results"


def seconds(function, repeats: int = 3, device: str = "cpu") -> float:
    """Return the shortest of `repeats` runs of `function`, after one run to warm up, in seconds."""
    best = float("inf")
    for run in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        if run:
            best = min(best, time.perf_counter() - start)
    return best


def synchronize(device: str):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


def apart(function, *args) -> tuple:
    """Return what `function(*args)` returns in a fresh process, and that process's peak memory in GiB.

    The memory is the GPU's, as torch allocated it, if the process used one; otherwise the process's resident memory.
    Function and arguments are pickled. An error in there is raised here.
    """
    context = multiprocessing.get_context("spawn")
    results, end = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(end, function, args))
    process.start()
    end.close()
    try:
        result = results.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__} died without a result") from None
    finally:
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def measure(*rows: tuple, rounds: int = 2) -> list[dict]:
    """Return report's rows of (what, function, *args), each function's speed the best of several fresh processes.

    They run in turns, because a processor that others share is faster in one minute than in the next.
    """
    best = {}
    for _ in range(rounds):
        for what, function, *args in rows:
            speed, peak = apart(function, *args)
            print(f"{what}: {speed:.3g}", flush=True)
            if what not in best or speed > best[what]["speed"]:
                best[what] = {"what": what, "speed": speed, "peak_gib": peak}
    return list(best.values())


def _apart(end, function, args):
    try:
        value = function(*args)
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        end.send((value, gpu / 2**30 or resident_peak()))
    except Exception as error:
        end.send(error)


def resident_peak() -> float:
    """Return this process's peak of resident memory in GiB (getrusage's holds its parent's as well)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def report(name: str, rows: list[dict], /, unit: str = "images/s", **settings):
    """Print a table and write it to benchmarks/results/<name>.<cpu|gpu>.json.

    Each row has "what", "speed" (in `unit`), "peak_gib" (or None). The row whose "what" starts with "plain" and the one
    whose "what" starts with "limit" are what the others are divided by, where they are there.
    """
    plain = next((row["speed"] for row in rows if row["what"].startswith("plain")), None)
    limit = next((row["speed"] for row in rows if row["what"].startswith("limit")), None)
    print(f"\n{name} on {device_name()}, {', '.join(f'{key} {value}' for key, value in settings.items())}")
    print(f"{'':44s}{unit:>12s}{'x plain':>10s}{'of limit':>10s}{'peak GiB':>10s}")
    for row in rows:
        row["x_plain"] = row["speed"] / plain if plain else None
        row["of_limit"] = row["speed"] / limit if limit else None
        cells = f"{row['speed']:12.2f}"
        cells += f"{row['x_plain']:10.2f}" if plain else " " * 10
        cells += f"{row['of_limit']:10.0%}" if limit else " " * 10
        cells += f"{row['peak_gib']:10.2f}" if row.get("peak_gib") else ""
        print(f"{row['what']:44s}{cells}")
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "settings": settings,
        "unit": unit,
        "rows": rows,
    }
    kind = "gpu" if torch.cuda.is_available() else "cpu"
    RESULTS.mkdir(exist_ok=True)
    write_whole(RESULTS / f"{name}.{kind}.json", json.dumps(result, indent=2, default=str) + "\n")


def device_name() -> str:
    """Return the GPU's name, or the processor's with the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{processor}, {torch.get_num_threads()} threads"


def markdown() -> str:
    """Return the README's table of all results, a CPU's and a GPU's side by side; what one never ran says so."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.?pu.json"))}
    results = {stem: result for stem, result in results.items() if "rows" in result}
    kinds = ("cpu", "gpu")
    lines = ["| | CPU | GPU |", "|---|---|---|"]
    for name in dict.fromkeys(stem.rpartition(".")[0] for stem in results):
        found = [results.get(f"{name}.{kind}") for kind in kinds]
        heads = [f"{r['date']}, {r['device']}<br>{settings_text(r)}" if r else "not measured" for r in found]
        lines.append(f"| **{name}** | {' | '.join(heads)} |")
        rows = [{row["what"]: row for row in r["rows"]} if r else {} for r in found]
        for what in dict.fromkeys(what for table in rows for what in table):
            cells = [cell(r, table[what]) if what in table else "" for r, table in zip(found, rows, strict=True)]
            lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def settings_text(result: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in result["settings"].items())


def cell(result: dict, row: dict) -> str:
    """Return a row's speed, and what it is of the plain loop's and of the limit."""
    ratios = []
    if row.get("x_plain") and not row["what"].startswith("plain"):
        ratios.append(f"{row['x_plain']:.2f} x plain")
    if row.get("of_limit") and not row["what"].startswith("limit"):
        ratios.append(f"{row['of_limit']:.0%} of the limit")
    if row.get("peak_gib"):
        ratios.append(f"{row['peak_gib']:.1f} GiB")
    speed = f"{row['speed']:,.0f}" if row["speed"] >= 100 else f"{row['speed']:.3g}"
    return f"{speed} {result['unit']}" + (f" ({', '.join(ratios)})" if ratios else "")


if __name__ == "__main__":
    print(markdown())
