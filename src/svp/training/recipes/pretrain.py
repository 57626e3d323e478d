"""How the small backbones that ship with the package were trained from random weights at 64 pixels: method full."""

from svp.training.recipe import Recipe, RecipeRow

SMALL = Recipe(
    epochs=60, batch_size=512, lr=2e-3, weight_decay=0.05, warmup=0.05, warmup_unit="fraction", drop_last=True,
    clip_grad=1.0, label_smoothing=0.1, mixup=0.2, augment="crop", crop_scale=(0.25, 1.0), eval_batch_size=500,
)  # fmt: skip

RECIPES = {
    "pretrain-nano": RecipeRow("pretrain-nano", SMALL, method="full", note="two million numbers"),
    "pretrain-tiny": RecipeRow(
        "pretrain-tiny", SMALL.but(lr=1.5e-3, mixup=0.8, cutmix=1.0, drop_path=0.1), method="full",
        note="seven million numbers: they learn the pictures by heart sooner",
    ),
}  # fmt: skip
