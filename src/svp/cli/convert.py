"""`svp convert`: checkpoints between .pth and .safetensors, other programs' adapters into ours and back; every key is reported."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from svp.cli.words import JSON, Page, examples, say
from svp.errors import SvpError

if TYPE_CHECKING:
    from svp.backbones.base import Backbone
    from svp.backbones.checkpoints import Report

FILES = (".safetensors", ".pth", ".pt", ".bin")


@click.command(
    cls=Page,
    sections={
        "Reading": ("ema", "trust_pickle"),
        "Adapters": ("backbone", "weights", "to"),
        "Run": ("overwrite", "keys", "as_json"),
    },
    epilog=examples(
        "svp convert vim_t_midclstok_76p1acc.pth vim_tiny.safetensors",
        "svp convert vim_tiny.safetensors vim_tiny.pth",
        "svp convert authors/best_checkpoint.pth my-adapter/",
        "svp convert authors/best_checkpoint.pth my-adapter/ --backbone vim_small --weights vim_s_midclstok_80p5acc.pth",
        "svp convert peft-lora/ my-adapter/ --backbone vit_small_patch16_224.augreg_in21k_ft_in1k --weights default",
        "svp convert my-adapter/ peft-lora/ --to peft",
    ),
)
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@click.option("--ema", is_flag=True, help="Take the averaged weights of a training checkpoint (model_ema).")
@click.option("--trust-pickle", is_flag=True, help="Read a .pth that holds code. It is run: only for files you trust.")
@click.option(
    "--backbone", metavar="NAME", help="What the adapter was trained on; it is compared.  [default: taken from IN]"
)
@click.option(
    "--weights", metavar="default|FILE|hf:OWNER/NAME", help="Of that backbone; OUT then holds the adapter alone."
)
@click.option("--to", type=click.Choice(["peft"]), help="Write a LoRA of this package in peft's layout.")
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--keys", is_flag=True, help="Name every key instead of the first ones.")
@JSON
def command(**typed: Any) -> None:
    """Turn checkpoints and other people's adapters into files of this package.

    IN is a file, or the folder of a LoRA that peft saved. A backbone becomes .safetensors or .pth, as OUT ends; an adapter
    trained with the authors' code or with peft becomes a folder that svp eval, svp predict and svp.load read.
    """
    from svp.model.folder import CONFIG

    source, target = Path(typed["source"]).expanduser(), Path(typed["target"]).expanduser()
    if bool(typed["backbone"]) != bool(typed["weights"]):
        raise SvpError("--backbone and --weights belong together", "--backbone vim_small --weights FILE", "usage")
    refuse(source, target, typed["overwrite"])
    if any((source / part / CONFIG).is_file() for part in ("", "model")):  # or in a run folder
        show(adapter_folder(source, target, typed), target, True, typed)
        return
    if typed["to"]:
        raise SvpError(
            f"{source} is no adapter folder, which --to needs", "svp convert my-adapter/ OUT/ --to peft", "usage"
        )
    from svp.backbones.checkpoints import read_checkpoint
    from svp.convert import convert_checkpoint, is_published_adapter

    reading = {"trust_pickle": typed["trust_pickle"], "ema": typed["ema"]}
    is_adapter = is_published_adapter(read_checkpoint(source, **reading))
    if is_adapter:
        report = adapter(source, target, base(typed), reading)
    elif typed["backbone"]:
        raise SvpError(
            f"{source} is a backbone, no adapter: it needs none", "leave --backbone and --weights out", "usage"
        )
    else:
        report = convert_checkpoint(source, target, **reading)
    show(report, target, is_adapter, typed)


def refuse(source: Path, target: Path, overwrite: bool) -> None:
    """What must not be written, before anything is read."""
    if source.exists() and target.exists() and source.samefile(target):
        raise SvpError(f"{target} is the file that is read", "give another name", "usage")
    is_there = target.is_file() or (target.is_dir() and any(target.iterdir()))
    if is_there and not overwrite:
        raise SvpError(f"{target} exists", "--overwrite replaces it", "usage")
    if target.is_dir() and target.suffix in FILES:
        raise SvpError(f"{target} is a folder", "give another name", "usage")


def base(typed: dict[str, Any]) -> Backbone | None:
    """The backbone that an adapter is for, where it is named."""
    if not typed["backbone"]:
        return None
    from svp.backbones.create import create_backbone

    return create_backbone(typed["backbone"], weights=typed["weights"], trust_pickle=typed["trust_pickle"])


def adapter_folder(source: Path, target: Path, typed: dict[str, Any]) -> Report:
    """A folder with an adapter_config.json: peft's into ours, or ours into peft's layout."""
    from svp.convert import convert_from_peft, convert_to_peft, is_peft

    if target.suffix in FILES or target.is_file():
        raise SvpError(f"{source} is an adapter, which becomes a folder", f"svp convert {source} {target.with_suffix('')}", "usage")  # fmt: skip
    if not is_peft(source):
        if not typed["to"]:
            raise SvpError(f"{source} is an adapter of this package already", "--to peft writes a LoRA in peft's layout", "usage")  # fmt: skip
        return convert_to_peft(source, target, base(typed))
    if typed["to"]:
        raise SvpError(f"{source} is in peft's layout already", "leave --to out", "usage")
    net = base(typed)
    if net is None:
        raise SvpError(f"{source} does not hold the network that it was trained on", "--backbone NAME --weights FILE", "usage")  # fmt: skip
    return convert_from_peft(source, target, net)


def adapter(source: Path, target: Path, net: Backbone | None, reading: dict[str, bool]) -> Report:
    from svp.convert import convert_adapter

    if target.suffix in FILES or target.is_file():
        raise SvpError(
            f"{source} is an adapter, which becomes a folder", f"svp convert {source} {target.with_suffix('')}", "usage"
        )
    return convert_adapter(source, target, backbone=net, **reading)


def show(report: Report, target: Path, is_adapter: bool, typed: dict[str, Any]) -> None:
    kind = "adapter" if is_adapter else "backbone"
    if typed["as_json"]:
        from svp.cli.words import print_json

        parts = {"loaded": report.loaded, "resized": report.resized, "left_out": report.left_out}
        print_json({"in": typed["source"], "out": str(target), "kind": kind, "notes": report.notes, **parts})
        return
    lines = report.lines()
    if typed["keys"]:
        parts = {"loaded": report.loaded, "resized": report.resized, "left out": report.left_out}
        lines = [*report.notes, *(f"{word}: {key}" for word, keys in parts.items() for key in keys)]
    click.echo("\n".join(lines))
    click.echo(f"{kind} written: {target}")
    if is_adapter and not typed["to"]:
        say(f"next: svp predict {shlex.quote(str(target))} PICTURE")
