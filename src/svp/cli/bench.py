"""`svp bench`: words to sizes and rows, and the tables of what was measured."""

from __future__ import annotations

from typing import Any

import click

from svp.cli.words import DEVICE, JSON, KERNEL, Counts, Finite, Page, columns, examples, say
from svp.errors import SvpError

TITLES = {"train": "training step", "infer": "inference"}
SECTIONS = {
    "What": ("backbone", "method", "img_size", "batch_size", "only", "sweep", "data", "quick"),
    "How": ("threads", "seconds", "memory", "device", "amp", "kernel"),
    "Result": ("plot", "as_json"),
}


@click.command(
    cls=Page,
    sections=SECTIONS,
    epilog=examples(
        "svp bench",
        "svp bench --quick",
        "svp bench --img-size 224,384,768 --batch-size 8,4,1 --threads 1,2 --json > bench.json",
        "svp bench --only ours,vit --backbone vim_tiny --plot tokens.png",
        "svp bench photos/ --device cuda --amp bf16 --batch-size 96",
    ),
)
@click.argument("source", required=False)
@click.option("--backbone", metavar="NAME", default="vim_small", show_default=True, help="A Vision Mamba; its weights are random.")  # fmt: skip
@click.option("--method", metavar="NAME[:PRESET]", default="svp", show_default=True, help="How it is adapted.")
@click.option("--img-size", type=Counts("sizes"), metavar="PIXELS,…", default="224,768", show_default=True, help="Sides of the pictures.")  # fmt: skip
@click.option("--batch-size", "-b", type=Counts("sizes"), metavar="COUNT,…", default="8,1", show_default=True, help="Pictures of a step, one number for each size.")  # fmt: skip
@click.option("--only", metavar="ROW,…", help="Rows to measure: ours, checkpointed, compiled, reference, pscan, mamba_ssm, vit, vpt.")  # fmt: skip
@click.option("--sweep", type=Counts("sizes"), metavar="PIXELS,…", help="Also as many tokens a batch in pictures of these sizes.  [with --plot: 224,320,448,640,896]")  # fmt: skip
@click.option(
    "--data/--no-data", default=True, help="Measure decoding and augmentation, and what keeping features saves."
)
@click.option("--quick", is_flag=True, help="Ours, the ViT and the floor for 15 seconds a size; no memory, no data.")
@click.option("--threads", type=Counts("numbers", 1024), metavar="COUNT,…", help="Of the processor.  [default: as torch has it]")  # fmt: skip
@click.option("--seconds", type=Finite(above=0), help="About how long each size is measured.  [default: 60]")
@click.option("--memory/--no-memory", default=True, help="Measure memory, each row in a process of its own.")
@click.option("--plot", metavar="FILE", help="Draw time and memory of the sweep against tokens: .png, .svg or .pdf.")
@click.option("--amp", type=click.Choice(["off", "bf16", "fp16"]), default="off", show_default=True, help="Precision of forward passes.")  # fmt: skip
@KERNEL
@DEVICE
@JSON
def command(**typed: Any) -> None:
    """Measure a training step here, beside its peers and what the machine can do at most.

    Every row is first checked against the reference in float64; then all take turns in one process. The floor is the
    bare matrix products of the step. The ViT is timm's of equal width with 50 prompts before every block. Rows marked ~
    ran on some of the blocks, and their time is in proportion. Pictures that are decoded come from SOURCE, or are drawn
    for the occasion.
    """
    sizes = pairs(typed["img_size"], typed["batch_size"])
    if typed["plot"]:
        from svp.studies.bench.sweep import SIZES, check_plot

        check_plot(typed["plot"])
        typed["sweep"] = typed["sweep"] or SIZES
    found = run(typed, sizes)
    if typed["plot"]:
        from svp.studies.bench.sweep import draw

        draw(found["sweep"], typed["plot"])
    if typed["as_json"]:
        from svp.cli.words import print_json

        print_json(found)
        return
    click.echo("\n\n".join(pages(found)))


def pairs(img_sizes: tuple[int, ...], batch_sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    if len(batch_sizes) == 1:
        batch_sizes *= len(img_sizes)
    if len(batch_sizes) != len(img_sizes):
        raise SvpError(
            f"--img-size names {len(img_sizes)} sizes, --batch-size {len(batch_sizes)} ({','.join(map(str, batch_sizes))})",
            "one batch size, or one for each: --img-size 224,768 --batch-size 8,1", "usage",
        )  # fmt: skip
    return list(zip(img_sizes, batch_sizes, strict=True))


def run(typed: dict[str, Any], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Measure, and say where and what: machine, versions, options."""
    import torch

    from svp.cli import doctor
    from svp.studies.bench.run import bench
    from svp.studies.bench.setting import Setting
    from svp.training.machine import device_named, git_revision, precision

    device = device_named(typed["device"])
    name, _, preset = typed["method"].partition(":")
    setting = Setting(
        backbone=typed["backbone"], method=name, options={"preset": preset} if preset else {}, device=str(device),
        amp=precision(typed["amp"], None, device), kernel=typed["kernel"],
    )  # fmt: skip
    quick = typed["quick"]
    only = typed["only"].split(",") if typed["only"] else ["ours", "vit"] if quick else None
    seconds = typed["seconds"] or (15.0 if quick else 60.0)
    before = torch.get_num_threads()
    threads = typed["threads"] or (before,)
    try:
        measured = bench(
            setting, sizes=sizes, threads=threads, seconds=seconds, only=only,
            with_memory=typed["memory"] and not quick, sweep_sizes=typed["sweep"] or (),
            with_data=typed["data"] and not quick, source=typed["source"], tell=say,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    asked = {key: typed[key] for key in ("backbone", "method", "amp", "kernel")} | {"seconds": seconds}
    asked |= {"img_size": [s for s, _ in sizes], "batch_size": [b for _, b in sizes], "threads": list(threads)}
    machine = {**doctor.machine(), **doctor.torch_machine(), "device": str(device), "level": doctor_level()}
    return {"asked": asked, "machine": machine, "versions": doctor.versions(), "git": git_revision(), **measured}


def doctor_level() -> str:
    from svp.ops import native

    return native.isa()


# -- printing ----------------------------------------------------------------------------------------------------------


def pages(found: dict[str, Any]) -> list[str]:
    """The tables, one text each."""
    m = found["machine"]
    checks = ", ".join(f"{c['row']} {c['error']:.0e}" for c in found["checks"])
    head = [f"{m['cpu']}, {m['cores']} cores; {m['device']}; {m['level'] or 'no compiled kernels'}; torch {found['versions']['torch']}",
            f"largest errors against float64: {checks}"]  # fmt: skip
    head += [f"left out: {row['row']} ({row['reason']})" for row in found["left_out"]]
    return ["\n".join(head), *(table(run, what) for run in found["runs"] for what in TITLES),
            *map(feeding, found["data"]), *map(probe, found["probe"]), *([sweep(found["sweep"])] if found["sweep"] else [])]  # fmt: skip


def table(run: dict[str, Any], what: str) -> str:
    """One size, training or inference: a line a row, the floor last, and what the floor is made of."""
    key = "cpu_seconds" if run["counts_cpu_time"] else "seconds"
    clock = "CPU time" if run["counts_cpu_time"] else "time"
    heads = ["row", clock, "median", "images/s", "x floor", "of ViT's speed", "memory", "of ViT's"]
    rows = [cells(line, key) for line in run["rows"] if line["what"] == what]
    floor = run["floor"][what]
    rows.append(["floor", ms(floor[key]["min"]), ms(floor[key]["median"]), rate(run['batch_size'] / floor[key]['min']), "1.00", "", "", ""])  # fmt: skip
    title = f"{TITLES[what]}, {run['img_size']} px ({run['tokens']:,} tokens), batch {run['batch_size']}, {run['threads']} thread{'s' * (run['threads'] > 1)}"  # fmt: skip
    parts = ", ".join(f"{name} {ms(value)}" for name, value in floor["scan_parts_seconds"].items())
    least = f"floor: {floor['gmac_per_image']:.2f} GMAC a picture at {floor['flops_per_second'] / 1e9:,.0f} GFLOP/s; the scans beside it at least {ms(floor['scan_seconds'])} ({parts})"  # fmt: skip
    left_out = [f"left out: {row['row']} ({row['reason']})" for row in run["left_out"]]
    return "\n".join([title, narrow(heads, rows), least, *left_out])


def narrow(heads: list[str], rows: list[list[str]]) -> str:
    """The table without columns that nobody fills."""
    kept = [k for k in range(len(heads)) if any(row[k] for row in rows)]
    return columns(
        [heads[k] for k in kept], [[row[k] for k in kept] for row in rows], right=[heads[k] for k in kept[1:]]
    )


def feeding(data: dict[str, Any]) -> str:
    """How fast pictures come beside the step; said in words where it waits."""
    step = data["step_images_per_second"]
    heads = ["workers", "decoded", "pictures/s", "step waits"]
    rows = [
        [str(r["workers"]), r["decoded"], f"{r['pictures_per_second']:,.1f}", "" if r["step_waits"] is None else f"{r['step_waits']:.1%}"]
        for r in data["rows"]
    ]  # fmt: skip
    title = f"pictures of {data['img_size']} px, {data['source']}: decoded, cropped, mixed" + ("" if step is None else f"; the step takes {rate(step)} a second")  # fmt: skip
    slow = [r for r in data["rows"] if r["workers"] and step is not None and r["pictures_per_second"] < step]
    said = [f"the loader is slower than the step with {r['workers']} workers, decoded {r['decoded']}" for r in slow]
    return "\n".join([title, columns(heads, rows, right=heads[2:]), *said])


def probe(found: dict[str, Any]) -> str:
    return (
        f"linear probe, {found['img_size']} px: {rate(found['computed']['images_per_second'])} images/s where each step computes the "
        f"features, {found['kept']['images_per_second']:,.0f} where they are kept: {found['epochs']} epochs {found['times_faster']:.1f} times faster"
    )  # fmt: skip


def sweep(runs: list[dict[str, Any]]) -> str:
    """Time and memory a token, and how much they change with the size of the picture."""
    from svp.studies.bench.sweep import ROWS, growth, series

    heads = ["px", "tokens", "batch", *(f"{row} {unit}" for unit in ("us/token", "KiB/token") for row in ROWS)]
    rows = []
    for run in runs:
        lines = {line["row"]: line for line in run["rows"] if line["what"] == "train"}
        memory = [lines[row]["memory_bytes_per_token"] for row in ROWS]
        rows.append([
            str(run["img_size"]), f"{run['tokens']:,}", str(run["batch_size"]),
            *(f"{1e6 * lines[row]['seconds_per_token']:,.0f}" for row in ROWS),
            *("" if m is None else f"{m / 1024:,.0f}" for m in memory),
        ])  # fmt: skip
    said = []
    for key, word in (("seconds_per_token", "time"), ("memory_bytes_per_token", "memory")):
        grown = {row: growth(series(runs, row, "train", key)) for row in ROWS}
        said += [f"{word} a token, largest over smallest: " + ", ".join(f"{row} {g:.2f}" for row, g in grown.items() if g)] * any(grown.values())  # fmt: skip
    return "\n".join(["training step by tokens", narrow(heads, rows), *said])


def cells(line: dict[str, Any], key: str) -> list[str]:
    part = "~" if "of_blocks" in line else ""
    ratio, memory, share = line["speed_over_vit"], line["memory_bytes"], line["memory_over_vit"]
    return [
        line["row"], part + ms(line[key]["min"]), part + ms(line[key]["median"]), rate(line['images_per_second']),
        f"{line['over_floor']:.2f}", "" if ratio is None else f"{ratio:.2f}",
        "" if memory is None else f"{memory / 2**20:,.0f} MiB", "" if share is None else f"{share:.2f}",
    ]  # fmt: skip


def ms(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{1000 * seconds:,.{1 if seconds < 1 else 0}f} ms"


def rate(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
