"""Our own recipe for small data: where the first run of anybody starts."""

from svp.training.recipe import Recipe, RecipeRow

RECIPES = {
    "default": RecipeRow(
        "default", Recipe(), note="10 epochs, AdamW, cosine; the learning rate is that of the method",
    ),
}  # fmt: skip
