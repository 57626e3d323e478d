"""Settings released with arXiv 2412.08947 (scripts/train.sh of zhoujiahuan1991/AAAI2025-SVP). A row lists what differs."""

from typing import Any

from svp.training.recipe import Recipe, RecipeRow

# the released code also keeps averaged weights (0.99996), but never evaluates them: no ema here
BASE = Recipe(
    epochs=100, batch_size=96, drop_last=True, lr_per=512, optimizer="adamw", schedule="timm_epoch", warmup=5,
    warmup_unit="epochs", warmup_lr=1e-5, min_lr=1e-5, label_smoothing=0.1, drop_path=0.1, amp="off",
    eval_batch_size=144, augment="timm", crop_scale=(0.08, 1.0), force_flip=True, auto_augment="rand-m9-mstd0.5-inc1",
    color_jitter=0.3, erase=0.25,
)  # fmt: skip
MIXED = dict(mixup=0.8, cutmix=1.0)
TWO, SIMAM = dict(head="two_linear"), dict(input_filter="simam")

TABLE: tuple[Any, ...] = (
    # name             lr      weight decay  mixing  S   method options       row
    ("svp-cub200",     6e-3,   1e-4,         MIXED,  8,  {},                  TWO),
    ("svp-cifar100",   5e-3,   1e-5,         MIXED,  12, SIMAM,               {}),
    ("svp-cifar10",    5e-3,   1e-4,         MIXED,  8,  SIMAM,               {}),
    ("svp-dtd",        6.5e-3, 1e-4,         MIXED,  4,  {},                  dict(seed=3407)),
    ("svp-dogs",       5e-4,   1e-8,         MIXED,  12, {},                  {}),
    ("svp-gtsrb",      1e-2,   1e-6,         MIXED,  6,  {},                  {}),
    ("svp-nabirds",    1e-2,   0.0,          MIXED,  8,  {},                  TWO),
    ("svp-svhn",       1.5e-2, 1e-3,         {},     12, {},                  {}),
    ("svp-flowers102", 1.5e-2, 1e-4,         {},     8,  SIMAM,               TWO),
    ("svp-food101",    5e-3,   1e-4,         MIXED,  8,  {},                  {}),
)  # fmt: skip

RECIPES = {
    name: RecipeRow(
        name, BASE.but(lr=lr, weight_decay=decay, **mixing), "arXiv 2412.08947, scripts/train.sh", "svp",
        dict(preset="published", hidden=64, shared_layers=s, **options), protocol="svp-released",
        note="100 epochs at 224 px", **row,
    )
    for name, lr, decay, mixing, s, options, row in TABLE
}  # fmt: skip
