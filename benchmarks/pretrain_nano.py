"""How the weights in the box are made: a small backbone from random weights on a folder of Parquet files, first at half its size.

    python benchmarks/pretrain_nano.py vim_nano parquet:DIR OUT --epochs 3 --finish-share 0.35

Two ordinary runs of `svp.fit` with method `full`; OUT gets both run folders, NAME.safetensors (fp16) and facts.json,
the file from which the model card's numbers come.
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


def share(split, fraction: float, seed: int = 0):
    """A seeded share of a split."""
    count = round(len(split) * fraction)
    return Part(split, index=np.sort(np.random.default_rng(seed).permutation(len(split))[:count]))


def show(event: dict) -> None:
    if event["kind"] in ("epoch", "note"):
        print({k: v for k, v in event.items() if not isinstance(v, (dict, list))}, flush=True)


def stage(net, data, recipe, out: Path):
    """One run; -> the trained backbone, its head kept, and what the run says of itself."""
    model = adapt(net, "full", num_classes=data.num_classes, classes=data.classes, probe=False)
    if net.num_classes == data.num_classes and net.weights_from != "random":
        model.head.load_state_dict(net.head.state_dict())
    run = fit(model, data, recipe=recipe, out=out, resume=out.exists(), report=show, workers=0, checkpoint_seconds=120)
    return model, model.merge(), run.result


def curve(run: Path, img_size: int) -> list[dict]:
    """The losses that a run logged while it trained."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{"img_size": img_size, "step": x["step"], "loss": round(x["loss"], 4)} for x in lines if "loss" in x]


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("backbone", choices=("vim_nano", "vit_nano"))
    words.add_argument("source")
    words.add_argument("out", type=Path)
    words.add_argument("--epochs", type=int, default=3, help="passes at 32 pixels")
    words.add_argument(
        "--finish-share", type=float, default=0.35, help="share of the training pictures seen at 64 pixels"
    )
    words.add_argument("--threads", type=int, default=2)
    opt = words.parse_args()
    torch.set_num_threads(opt.threads)
    data = open_data(opt.source)
    quick = data.but(val=share(data.val, 0.2))
    net = create_backbone(opt.backbone, img_size=32, num_classes=data.num_classes)
    _, small, first = stage(net, quick, recipe_named("pretrain-nano").but(epochs=opt.epochs), opt.out / "32px")
    save_backbone(small, opt.out / f"{opt.backbone}_32px.safetensors")

    finish = recipe_named("pretrain-nano-finish").but(epochs=1)
    large = create_backbone(opt.backbone, weights=opt.out / f"{opt.backbone}_32px.safetensors")
    model, net, second = stage(large, quick.but(train=share(data.train, opt.finish_share, 1)), finish, opt.out / "64px")
    save_backbone(net, opt.out / f"{opt.backbone}.safetensors", torch.float16, classes=list(data.classes))
    measured = evaluate(model, data, "val", batch_size=250)
    half = create_backbone(opt.backbone, weights=opt.out / f"{opt.backbone}.safetensors", img_size=32)
    model_32 = adapt(half, "linear", num_classes=data.num_classes, classes=data.classes, probe=False)
    model_32.head.load_state_dict(half.head.state_dict())
    measured_32 = evaluate(model_32, data, "val", batch_size=500)
    facts = {
        "backbone": opt.backbone, "parameters": sum(p.numel() for p in net.parameters()), "source": opt.source.split("/")[-1],
        "val_accuracy": measured.accuracy, "val_top5": measured.top5, "val_pictures": len(data.val),
        "val_accuracy_at_32_px": measured_32.accuracy, "val_top5_at_32_px": measured_32.top5,
        "pictures_seen": opt.epochs * len(data.train) + round(opt.finish_share * len(data.train)),
        "seconds": sum(r["timing"]["seconds"] for r in (first, second)), "threads": opt.threads,
        "torch": torch.__version__, "curve": curve(opt.out / "32px", 32) + curve(opt.out / "64px", 64),
        "stages": [
            {"img_size": size, "epochs": r["epochs"], "val_accuracy": r["val_accuracy"], "recipe": r["recipe"]}
            for size, r in ((32, first), (64, second))
        ],
    }  # fmt: skip
    (opt.out / "facts.json").write_text(json.dumps(facts, indent=2, default=str) + "\n")
    print(json.dumps({k: v for k, v in facts.items() if k not in ("stages", "curve")}, default=str))


if __name__ == "__main__":
    main()
