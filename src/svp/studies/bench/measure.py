"""One size, one number of threads: every row and the floor in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from svp.data.kept import memory_bytes as memory_of_machine
from svp.model import AdaptedModel
from svp.ops import floor as scan_floor
from svp.ops.timing import Timing, interleaved, spread, timed
from svp.studies.bench import products
from svp.studies.bench.memory import memory_bytes
from svp.studies.bench.peers import PEERS
from svp.studies.bench.setting import Setting
from svp.training.machine import forget_peak_memory

WHAT = ("train", "infer")
KEPT_TENSORS = 12  # (b, l, e, n) float32 tensors that a plain scan keeps of one direction, padding included, roughly
MOST_ROUNDS = 25
UNWEIGHED = ("vpt",)  # its memory is that of the row vit, but for trifles

Tell = Callable[[str], None]


def measured(
    setting: Setting, rows: Sequence[str], *, seconds: float, with_memory: bool, tell: Tell = lambda text: None
) -> dict[str, Any]:
    """The run of one size: {"img_size", …, "rows": [...], "floor": {...}}; about `seconds` long, slow rows and memory beside."""
    torch.set_num_threads(setting.threads)
    model = setting.adapted(setting.network())
    net: Any = model.backbone
    fast = [row for row in rows if not PEERS[row].is_slow]
    lists = {
        "train": products.training(model, setting.batch_size),
        "infer": products.inference(model, setting.batch_size),
    }
    tell(f"{size_of(setting)}: {', '.join([*fast, 'floor'])} in turn")
    timings, rates = in_turn(setting, model, lists, fast, seconds)
    forget_peak_memory(torch.device(setting.device))  # what the steps have left goes back to the system
    table = [
        {"row": row, "what": what, **of_timing(timings[f"{row} {what}"])} for what in WHAT for row in fast
    ]  # fmt: skip
    left_out = []
    for row in (row for row in rows if PEERS[row].is_slow):
        if fits(setting):
            tell(f"{size_of(setting)}: {row}, once")
            table += slow(setting, row, net.depth, seconds)
        else:
            left_out.append({"row": row, "reason": "one block of a plain scan would fill this machine's memory"})
    if with_memory:
        for row in (row for row in fast if row not in UNWEIGHED):
            tell(f"{size_of(setting)}: memory of {row}")
            for what, count in memory_bytes(setting, row).items():
                line = next(line for line in table if (line["row"], line["what"]) == (row, what))
                line["memory_bytes"] = count
    floor = {
        what: floor_of(setting, net, lists[what], what, timings[f"floor {what}"], rates) for what in WHAT
    }  # fmt: skip
    compare(table, floor, setting)
    return {
        "img_size": setting.img_size, "tokens": products.tokens_of(net), "batch_size": setting.batch_size,
        "threads": setting.threads, "counts_cpu_time": setting.uses_cpu_time, "rows": table, "floor": floor,
        "left_out": left_out, "rates_per_second": rates, "counts": products.counts(model),
    }  # fmt: skip


def in_turn(
    setting: Setting, model: AdaptedModel, lists: dict[str, list[products.Product]], fast: Sequence[str], seconds: float
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Timings of "ROW train", "ROW infer", "floor train", "floor infer"; and the machine's rates, work a second."""
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[setting.amp]
    probes = scan_floor.probes(setting.device)
    calls: dict[str, Callable[[], object]] = {}
    for row in fast:
        step = PEERS[row].build(setting)
        calls |= {f"{row} train": step.train, f"{row} infer": step.infer}
    calls |= {f"floor {what}": products.Floor(model, lists[what], dtype).run for what in WHAT}
    calls |= {name: probe.call for name, probe in probes.items()}
    seldom = [name for name in calls if name.startswith(("vpt ", "checkpointed "))]
    timings = interleaved(calls, MOST_ROUNDS, seconds=seconds, seldom=seldom, device=setting.device)
    rates = {name: p.work / min(timings[name].chosen(setting.uses_cpu_time)) for name, p in probes.items()}
    if setting.device.startswith("cuda") and (rate := scan_floor.gpu_exponentials(setting.device)):
        rates["exponentials"] = rate
    return timings, rates


def of_timing(timing: Timing) -> dict[str, Any]:
    return {"seconds": spread(timing.wall), "cpu_seconds": spread(timing.cpu)}


def slow(setting: Setting, row: str, depth: int, seconds: float) -> list[dict[str, Any]]:
    """A row that would take minutes, once: on as many blocks as time allows; the whole is then in proportion."""
    lines = []
    for what in WHAT:
        one = timed_once(setting, row, 1, what)
        allowed = int(min(depth, max(1.0, seconds / 4 / max(one.wall[0], 1e-9))))
        timing = one if allowed == 1 else timed_once(setting, row, allowed, what)
        scale = depth / allowed
        whole = Timing([scale * s for s in timing.wall], [scale * s for s in timing.cpu])
        part = {} if allowed == depth else {"of_blocks": allowed}
        lines.append({"row": row, "what": what, **of_timing(whole), **part})
    return lines


def timed_once(setting: Setting, row: str, depth: int, what: str) -> Timing:
    step = PEERS[row].build(setting.but(overrides={**setting.overrides, "depth": depth}))
    found = Timing()
    found.add(*timed(getattr(step, what), setting.device))
    return found


def fits(setting: Setting) -> bool:
    """Whether a block of a plain scan does; it keeps the states of every token, and blocks are computed again one by one."""
    net: Any = setting.shape()
    block = net.site().blocks[0]
    need = KEPT_TENSORS * 4 * setting.batch_size * products.tokens_of(net) * block.e * block.n * block.k
    have = (
        torch.cuda.get_device_properties(setting.device).total_memory
        if setting.device.startswith("cuda")
        else memory_of_machine()
    )
    return need < have / 2


def floor_of(
    setting: Setting, net: Any, listed: list[products.Product], what: str, timing: Timing, rates: dict[str, float]
) -> dict[str, Any]:
    """The bare products as measured, and the least that the scans can take at the rates of this run."""
    parts: dict[str, float] = {}
    for block in net.site().blocks:
        values = float(setting.batch_size * products.tokens_of(net) * block.e * block.k)
        per_thread = scan_floor.scan_parts(values, block.n, what == "train", rates)
        parts = {name: parts.get(name, 0.0) + value for name, value in per_thread.items()}
    mac = products.mac(listed)
    return {
        **of_timing(timing), "gmac_per_image": mac / setting.batch_size / 1e9, "products": len(listed),
        "scan_parts_seconds": parts, "scan_seconds": scan_floor.least(parts),
        "flops_per_second": 2 * mac / min(timing.chosen(setting.uses_cpu_time)),
    }  # fmt: skip


def compare(table: list[dict[str, Any]], floor: dict[str, Any], setting: Setting) -> None:
    """Write what the numbers mean into every line: images a second, times the floor, relative to the ViT."""
    key = "cpu_seconds" if setting.uses_cpu_time else "seconds"
    vits = {line["what"]: line for line in table if line["row"] == "vit"}
    for line in table:
        line.setdefault("memory_bytes", None)
        best, own, vit = line[key]["min"], line["memory_bytes"], vits.get(line["what"])
        line["images_per_second"] = setting.batch_size / best
        line["over_floor"] = best / floor[line["what"]][key]["min"]
        line["speed_over_vit"] = vit[key]["min"] / best if vit else None
        line["memory_over_vit"] = own / vit["memory_bytes"] if own and vit and vit.get("memory_bytes") else None


def size_of(setting: Setting) -> str:
    many = f"{setting.threads} thread{'s' * (setting.threads > 1)}"
    return f"{setting.img_size} px, batch {setting.batch_size}, {many}"
