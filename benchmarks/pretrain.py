"""How the weights in the box are made: a small backbone from random weights on a folder of Parquet files.

    python benchmarks/pretrain.py vim_nano parquet:DIR OUT [--epochs 60] [--device cuda] [--workers 5]

An ordinary run of `svp.fit` with method `full` and the recipe named in RECIPES; OUT gets the run folder, NAME.safetensors
(fp16) and facts.json, the file from which the model card's numbers come.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from svp.backbones.checkpoints import save_backbone
from svp.backbones.create import create_backbone
from svp.data.sources import open_data
from svp.data.splits import Part
from svp.model import adapt
from svp.training.evaluate import evaluate
from svp.training.loop import fit
from svp.training.recipe import recipe_named

RECIPES = {"vim_nano": "pretrain-nano", "vit_nano": "pretrain-nano", "vim_tiny_64": "pretrain-tiny"}
LOOKED_AT = 0.2  # share of the validation pictures that is looked at after every epoch


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("backbone", choices=RECIPES)
    words.add_argument("source")
    words.add_argument("out", type=Path)
    words.add_argument("--epochs", type=int, help="as the recipe says, unless given")
    words.add_argument("--device", default="auto")
    words.add_argument("--workers", type=int, default=0)
    words.add_argument("--compile", action="store_true", help="through torch.compile")
    opt = words.parse_args()
    data = open_data(opt.source)
    quick = data.but(val=share(data.val, LOOKED_AT))
    recipe = recipe_named(RECIPES[opt.backbone])
    recipe = recipe if opt.epochs is None else recipe.but(epochs=opt.epochs)
    model = adapt(
        create_backbone(opt.backbone, num_classes=data.num_classes),
        "full", num_classes=data.num_classes, classes=data.classes, probe=False,
    )  # fmt: skip
    run = fit(
        model, quick, recipe=recipe, device=opt.device, workers=opt.workers, compile=opt.compile, out=opt.out / "run",
        resume=(opt.out / "run").exists(), report=show, checkpoint_seconds=120,
    )  # fmt: skip
    path = opt.out / f"{opt.backbone}.safetensors"
    save_backbone(model.merge().cpu(), path, torch.float16, classes=list(data.classes))
    at_64, at_32 = (measured(opt.backbone, path, size, data, opt) for size in (64, 32))
    facts = {
        "backbone": opt.backbone, "parameters": sum(p.numel() for p in model.backbone.parameters()),
        "source": opt.source.rstrip("/").split("/")[-1], "val_pictures": len(data.val),
        "val_accuracy": at_64.accuracy, "val_top5": at_64.top5,
        "val_accuracy_at_32_px": at_32.accuracy, "val_top5_at_32_px": at_32.top5,
        "pictures_seen": recipe.epochs * len(data.train),
        "stages": [{"img_size": 64, "epochs": recipe.epochs, "recipe": run.result["recipe"]}],
        "seconds": run.result["timing"]["seconds"], "device": device_words(run.result), "torch": torch.__version__,
        "curve": curve(opt.out / "run"),
    }  # fmt: skip
    (opt.out / "facts.json").write_text(json.dumps(facts, indent=1, default=str) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in facts.items() if k not in ("curve", "stages")}, default=str))


def share(split, fraction: float, seed: int = 0):
    """A seeded share of a split."""
    count = round(len(split) * fraction)
    return Part(split, index=np.sort(np.random.default_rng(seed).permutation(len(split))[:count]))


def show(event: dict) -> None:
    if event["kind"] in ("epoch", "note"):
        print({k: v for k, v in event.items() if not isinstance(v, (dict, list))}, flush=True)


def measured(name: str, path: Path, img_size: int, data, opt: argparse.Namespace):
    """Validation accuracy of the stored weights and their own head, all pictures."""
    net = create_backbone(name, weights=path, img_size=img_size)
    model = adapt(net, "linear", num_classes=data.num_classes, classes=data.classes, probe=False)
    model.head.load_state_dict(net.head.state_dict())
    return evaluate(model, data, "val", batch_size=500, device=opt.device, workers=opt.workers)


def device_words(result: dict) -> str:
    device = torch.device(result["timing"]["device"])
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU core(s)"


def curve(run: Path) -> list[dict]:
    """What a run logged after each epoch; of the validation pictures those that were looked at."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("epoch", "train_loss", "val_loss", "val_accuracy")
    return [{key: round(line[key], 4) for key in kept} for line in lines if "val_loss" in line]


if __name__ == "__main__":
    main()
