"""How the small backbones that ship with the package were trained: method full, first at half size, then at full size."""

from svp.training.recipe import Recipe, RecipeRow

SMALL = Recipe(
    epochs=20, batch_size=128, lr=2e-3, weight_decay=0.05, warmup=200, warmup_unit="steps", drop_last=True,
    clip_grad=1.0, label_smoothing=0.1, augment="crop", crop_scale=(0.35, 1.0), eval_batch_size=500,
)  # fmt: skip

RECIPES = {
    "pretrain-nano": RecipeRow("pretrain-nano", SMALL, method="full", note="at 32 px, three quarters of the time"),
    "pretrain-nano-finish": RecipeRow(
        "pretrain-nano-finish", SMALL.but(epochs=4, batch_size=64, lr=5e-4, warmup=0.1, warmup_unit="fraction"), method="full",
        note="then at 64 px, with a warm restart of its own: one cosine over both sizes leaves the larger no rate",
    ),
}  # fmt: skip
