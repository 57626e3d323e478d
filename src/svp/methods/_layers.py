"""Where the linear layers and norms of a block lie: the words methods use, and the published names behind them."""

from __future__ import annotations

from svp.seams import Site

VIM = {
    "norm": "norm", "in_proj": "mixer.in_proj", "x_proj": "mixer.x_proj", "x_proj_b": "mixer.x_proj_b",
    "dt_proj": "mixer.dt_proj", "dt_proj_b": "mixer.dt_proj_b", "out_proj": "mixer.out_proj",
}  # fmt: skip
VIT = {"norm1": "norm1", "qkv": "attn.qkv", "proj": "attn.proj", "norm2": "norm2", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
UNKNOWN = "it knows the layers of Vim and of a ViT only"


def is_vit(site: Site) -> bool:
    return "attn" in site.blocks[0].kinds


def layers(site: Site, i: int) -> dict[str, str]:
    """{layer: published name without `.weight`} of block i, in the order in which data passes; {} for another network."""
    front, table = (f"blocks.{i}.", VIT) if is_vit(site) else (f"layers.{i}.", VIM)
    return {layer: front + name for layer, name in table.items() if f"{front}{name}.weight" in site.weights}
