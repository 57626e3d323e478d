"""`svp train`: words to a plan, a run for each method and seed, and the table that is read from their result.json."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Any

import click

from svp.cli.words import (
    AMP,
    BAD_IMAGE,
    DEVICE,
    JSON,
    MAX_PIXELS,
    WORKERS,
    Finite,
    Page,
    Seeds,
    columns,
    examples,
    note,
    say,
    say_skipped,
)
from svp.errors import SvpError

if TYPE_CHECKING:
    from svp.cli.plan import Plan, Wanted
    from svp.data.splits import Splits
    from svp.model import AdaptedModel

SECTIONS = {
    "Data": ("protocol", "on_bad_image", "max_pixels"),
    "Model": ("backbone", "weights", "img_size", "kernel"),
    "Method": ("method", "head", "method_options"),
    "Optimisation": ("recipe", "recipe_fields", "epochs", "lr", "weight_decay", "batch_size", "accumulate", "seed", "seeds"),
    "Run": ("out", "resume", "overwrite", "config", "dry_run", "device", "amp", "workers", "compile", "deterministic", "as_json", "quiet"),
}  # fmt: skip


@click.command(
    cls=Page,
    sections=SECTIONS,
    epilog=examples(
        "svp train digits --method svp,linear",
        "svp train folder:photos/ --method svp --epochs 20 --out runs/photos",
        "svp train photos/ --method linear,svp,svp:published,full --seeds 0,1,2",
        "svp train photos/ --method svp+lora -s svp.hidden=32 -r augment=none",
        "svp train --config runs/photos/config.yaml --out runs/again",
    ),
)
@click.argument("source", required=False)
@click.option("--backbone", metavar="NAME", help="The frozen network; `svp list backbones`.  [default: vim_nano]")
@click.option("--weights", metavar="default|none|FILE|hf:OWNER/NAME", help="Its weights.  [default: default]")
@click.option("--method", metavar="NAME,…", help="How it is adapted: svp,linear compares, svp+lora composes, svp:published names a preset; `svp list methods`.  [default: svp]")  # fmt: skip
@click.option(
    "--head", type=click.Choice(["linear", "two_linear"]), help="What comes after the feature.  [default: linear]"
)
@click.option(
    "--set", "-s", "method_options", metavar="[METHOD.]OPTION=VALUE", multiple=True, help="An option of a method."
)
@click.option("--recipe", metavar="NAME|FILE.yaml", help="How it is trained; `svp list recipes`.  [default: default]")
@click.option("-r", "recipe_fields", metavar="FIELD=VALUE", multiple=True, help="A field of the recipe.")
@click.option("--protocol", metavar="NAME", help="Split and selection rule; `svp list protocols`.  [default: default]")
@click.option(
    "--epochs", type=click.IntRange(0, 100_000), help="Passes over the training pictures; 0 with --dry-run only."
)
@click.option("--lr", type=Finite(above=0), help="Learning rate.  [default: the method's own]")
@click.option("--weight-decay", type=Finite(low=0), help="Weight decay.")
@click.option("--batch-size", "-b", type=click.IntRange(1, 1_000_000), help="Pictures of a forward pass.")
@click.option("--accumulate", type=click.IntRange(1, 100_000), help="Forward passes of a step.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Of start values, order and augmentation.  [default: 0]"
)
@click.option("--seeds", type=Seeds(), help="Several, for intervals: 0,1,2 or 0-4.")
@click.option("--img-size", type=click.IntRange(1, 100_000), metavar="PIXELS", help="Side of what the network sees.")
@click.option("--kernel", type=click.Choice(["auto", "reference", "cpu", "triton"]), help="Which selective scan answers.  [default: auto]")  # fmt: skip
@click.option("--out", metavar="FOLDER", help="The run folder.  [default: runs/<data>-<method>-<backbone>-s<seed>]")
@click.option("--resume", is_flag=True, help="Continue a half run, to the same numbers.")
@click.option("--overwrite", is_flag=True, help="Start again.")
@click.option("--config", metavar="FILE", help="Settings of an earlier run, or a part of them; what is typed wins.")
@click.option("--dry-run", is_flag=True, help="Build and try one batch, print the plan; nothing is kept.")
@click.option("--max-pixels", type=click.IntRange(1, MAX_PIXELS), default=MAX_PIXELS, show_default=True, help="Largest picture that is decoded.")  # fmt: skip
@click.option("--compile", is_flag=True, help="torch.compile the model.")
@click.option("--deterministic", is_flag=True, help="Only deterministic algorithms (GPU).")
@click.option("--quiet", "-q", is_flag=True, help="Only the table.")
@BAD_IMAGE
@DEVICE
@AMP
@WORKERS
@JSON
def command(**typed: Any) -> None:
    """Adapt a backbone to SOURCE and write a run folder.

    SOURCE is digits (built in), a folder DIR/class/*.jpg or DIR/{train,val,test}/class/*.jpg, or parquet:DIR with the
    files of a Hugging Face image data set. Without a validation split one is cut from train (20 %, stratified); the epoch
    is selected on it, never on test.
    """
    from svp.cli.plan import plan_from

    if typed["resume"] and typed["overwrite"]:
        raise SvpError(
            "--resume and --overwrite exclude each other", "--resume continues, --overwrite starts again", "usage"
        )
    ctx = click.get_current_context()
    for name in (
        "device",
        "amp",
        "on_bad_image",
        "max_pixels",
    ):  # their defaults stand in the help page; what nobody typed is no word
        if ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT:
            typed[name] = None
    plan = plan_from(typed)
    if plan.recipe.epochs == 0 and not typed["dry_run"]:
        raise SvpError("--epochs 0 trains nothing", "--epochs 10; 0 is for --dry-run", "usage")
    train(plan, typed)


def train(plan: Plan, typed: dict[str, Any]) -> None:
    """Run the plan and print its table."""
    from svp.data.sources import open_data
    from svp.ops import native
    from svp.training.facts import check_memory
    from svp.training.machine import device_named, kernel_name

    quiet = typed["quiet"]
    native.keep_freed_memory()
    data = open_data(
        plan.source,
        protocol=plan.protocol,
        seed=plan.cut_seed,
        on_bad_image=plan.on_bad_image,
        max_pixels=plan.max_pixels,
    )
    net = backbone_of(plan)
    for what, key, now in (("weights", "fingerprint", net.fingerprint), ("pictures", "hash", data.hash)):
        if key in plan.repeats and plan.repeats[key] != now():
            note(f"the {what} are not those of {plan.repeats['file']}: this is another run", quiet)
    check_memory(net, len(data.train), plan.recipe)  # before the probe, which would fill it
    if kernel_name(net, device_named(plan.device)) == "reference" and plan.kernel == "auto":
        note(f"plain PyTorch computes the scan, slowly ({native.reason}); `svp doctor` tells more", quiet)
    if typed["dry_run"]:
        told = [rehearse(plan, wanted, net, data, typed) for wanted in plan.wanted]
        if typed["as_json"]:
            from svp.cli.words import print_json

            print_json(told if len(told) > 1 else told[0])
        return
    results, folders = run_all(plan, net, data, typed)
    show(plan, data, results, folders, typed)


def backbone_of(plan: Plan) -> Any:
    """The frozen network of the plan, shared by all runs."""
    from svp.backbones.create import create_backbone

    return create_backbone(
        plan.backbone, weights=plan.weights, img_size=plan.img_size, kernel=plan.kernel, **plan.overrides
    )


def model_of(plan: Plan, wanted: Wanted, net: Any, data: Splits, seed: int) -> AdaptedModel:
    from svp.model import adapt

    return adapt(net, list(wanted.specs), num_classes=data.num_classes, head=plan.head, classes=data.classes, seed=seed)


def run_all(plan: Plan, net: Any, data: Splits, typed: dict[str, Any]) -> tuple[list[tuple[str, dict]], list[Any]]:
    """A run for each method and seed: (label, result) pairs, and their folders."""
    from svp.cli.progress import Progress
    from svp.training.folder import RunFolder
    from svp.training.loop import fit

    quiet = typed["quiet"]
    progress = Progress(quiet)
    todo = [(wanted, seed, plan.out(typed["out"], wanted, seed)) for wanted in plan.wanted for seed in plan.seeds]
    half = [folder for _, _, folder in todo if os.path.exists(folder / "config.yaml")]
    results: list[tuple[str, dict]] = []
    folders: list[Any] = []
    for wanted in plan.wanted[1:]:  # what cannot be built is said before the first has trained for hours
        model_of(plan, wanted, net, data, plan.seeds[0])
    try:
        for wanted, seed, folder in todo:
            model = model_of(plan, wanted, net, data, seed)
            first = seed == plan.seeds[0]
            if not results:
                introduce(plan, model, data, typed)
            if first:
                say(model.summary().splitlines()[0], quiet)
            was_finished = not typed["overwrite"] and RunFolder(folder).result() is not None
            run = fit(
                model, data, recipe=plan.recipe, seed=seed, out=folder, device=plan.device, amp=plan.amp,  # type: ignore[arg-type]
                workers=plan.workers, resume=typed["resume"] and (folder in half or not half), overwrite=typed["overwrite"],
                compile=plan.compile, report=progress, deterministic=plan.deterministic,
            )  # fmt: skip
            if was_finished:
                say(f"{folder} holds this run already: these are its numbers; --overwrite trains again", quiet)
            results.append((wanted.label, run.result))
            folders.append(folder)
    finally:
        progress.close()
    return results, folders


def introduce(plan: Plan, model: AdaptedModel, data: Splits, typed: dict[str, Any]) -> None:
    """The first lines: what is trained on what, and which kernel answers."""
    from svp.training.feed import prepared
    from svp.training.machine import device_named, kernel_name

    device, net = device_named(plan.device), model.backbone
    p = prepared(model.preprocessing, data)
    level = f" ({native_words()})" if kernel_name(net, device) == "cpu" else ""
    cut = "straight to" if p.exact else f"shorter side {p.shorter_side}, centre crop"
    say(
        f"{data.source}: {data.num_classes} classes; pictures {cut} {p.crop[0]} x {p.crop[1]}, {p.interpolation}",
        typed["quiet"],
    )
    for text in net.report.notes if net.report else ():
        if not text.startswith("head."):  # the network's own head is not used
            note(f"{net.weights_from}: {text}", typed["quiet"])
    say(f"{net.name}, weights {net.weights_from}; scan kernel {kernel_name(net, device)}{level}", typed["quiet"])


def native_words() -> str:
    import torch

    from svp.ops import native

    count = torch.get_num_threads()
    return f"{native.isa()}, {count} thread{'s' if count > 1 else ''}"


def show(plan: Plan, data: Splits, results: list[tuple[str, dict]], folders: list[Any], typed: dict[str, Any]) -> None:
    """The table, what it means, and what to type next."""
    from svp.studies.table import as_dict, baseline, cells, lines
    from svp.training.evaluate import raw_pixel_baseline

    table = lines(results)
    raw = raw_pixel_baseline(data) if data.test is not None else None
    if raw is not None:
        table.append(baseline("raw pixels, logistic regression", raw))
    if typed["as_json"]:
        from svp.cli.words import print_json

        runs = [
            {"method": label, "folder": str(f), **result} for (label, result), f in zip(results, folders, strict=True)
        ]
        print_json({"table": [as_dict(line) for line in table], "runs": runs})
        return
    shown = [cells(line) for line in table]
    heads = list(dict.fromkeys(key for row in shown for key in row))
    click.echo(columns(heads, [[row.get(key, "-") for key in heads] for row in shown], right=heads[1:]))
    split = table[0].split
    count = data.sizes[split]
    if len(plan.seeds) > 1:
        words = f"± is the 95 % interval of the mean over {len(plan.seeds)} seeds (Student's t)"
    else:
        from svp.studies.table import binomial_interval

        low, high = binomial_interval(table[0].mean, count)
        words = f"one seed, {count:,} pictures: {table[0].label} lies between {100 * low:.1f} and {100 * high:.1f} % (95 %, Wilson)"
    say(
        f"{split} accuracy at the epoch that {data.protocol.select if data.protocol.select != 'val' else 'validation'} selects; {words}",
        typed["quiet"],
    )
    say_skipped(data.skipped)
    where = folders[0] if len(folders) == 1 else os.path.commonpath([str(f) for f in folders])
    say(f"saved in {where}; next: svp predict {shlex.quote(str(folders[0]))} PICTURE", typed["quiet"])


def rehearse(plan: Plan, wanted: Wanted, net: Any, data: Splits, typed: dict[str, Any]) -> dict[str, Any]:
    """One batch forward and backward; every setting with its origin and what a run would cost, printed or for JSON."""
    from svp.training.rehearsal import rehearse as one_batch

    model = model_of(plan, wanted, net, data, plan.seeds[0])
    found = one_batch(model, data, recipe=plan.recipe, seed=plan.seeds[0], device=plan.device, amp=plan.amp)  # type: ignore[arg-type]
    minutes = found["steps"] * found["seconds_per_batch"] * plan.recipe.accumulate / 60
    told = {**found, "method": wanted.label, "trainable": model.num_trainable(head=True), "minutes": minutes}
    if typed["as_json"]:
        return told
    rows = [[name, _words(value), origin] for name, value, origin in _settings(plan, wanted, found, typed["out"])]
    click.echo(f"{wanted.label}\n{columns(['setting', 'value', 'from'], rows)}\n")
    click.echo(model.summary())
    click.echo(
        f"one batch: loss {found['loss']:.3f}, {found['seconds_per_batch']:.2f} s; {found['steps_per_epoch']} steps an epoch, "
        f"{found['steps']} in all, about {minutes:.0f} min and {found['peak_memory_bytes'] / 2**20:,.0f} MiB. Nothing was kept.\n"
    )
    return told


def _settings(plan: Plan, wanted: Wanted, found: dict[str, Any], out: str | None) -> list[tuple[str, Any, str]]:
    o = plan.origins
    rows = [
        ("source", found["source"], o["source"]), ("protocol", found["protocol"]["name"], o["protocol"]),
        ("backbone", found["backbone"]["name"], o["backbone"]), ("weights", found["backbone"]["weights"], o["weights"]),
        ("img_size", found["backbone"]["img_size"], o["img_size"]), ("head", found["head"], o["head"]),
        ("seeds", list(plan.seeds), o["seeds"]), ("amp", found["amp"], o["amp"]), ("device", found["device"], ""),
        ("out", str(plan.out(out, wanted, plan.seeds[0])), ""),
    ]  # fmt: skip
    for (name, options), (_, given) in zip(
        ((m["name"], m["options"]) for m in found["methods"]), wanted.specs, strict=True
    ):
        rows += [(f"{name}.{key}", value, "given" if key in given else "preset" if "preset" in given else "default") for key, value in options.items()]  # fmt: skip
    rows += [(f"recipe.{key}", value, o.get(f"recipe.{key}", "default")) for key, value in found["recipe"].items()]
    return rows


def _words(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_words, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
