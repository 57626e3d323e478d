"""The tiny ViT of the prompting goldens: published names of KMnP/vpt to timm's, and the network itself."""

import torch

from svp.backbones.vit import Vit

PREFIX = "transformer."
EMBEDDINGS = {"cls_token": "cls_token", "position_embeddings": "pos_embed", "patch_embeddings": "patch_embed.proj"}
LAYERS = {
    "attention_norm": "norm1", "ffn_norm": "norm2", "attn.out": "attn.proj", "ffn.fc1": "mlp.fc1", "ffn.fc2": "mlp.fc2",
}  # fmt: skip


def timm_state(tensors):
    """Published `transformer.*` tensors -> timm's names; q, k, v stacked."""
    state, qkv = {}, {}
    for key, t in tensors.items():
        name = key.removeprefix(PREFIX)
        if name.startswith("embeddings."):
            part, *leaf = name.removeprefix("embeddings.").split(".")
            state[".".join([EMBEDDINGS[part], *leaf])] = t
        elif name.startswith("encoder.encoder_norm."):
            state["norm." + name.rsplit(".", 1)[1]] = t
        elif name.startswith("encoder.layer."):
            _, _, i, rest = name.split(".", 3)
            part, leaf = rest.rsplit(".", 1)
            if part in ("attn.query", "attn.key", "attn.value"):
                qkv.setdefault((i, leaf), {})[part] = t
            else:
                state[f"blocks.{i}.{LAYERS[part]}.{leaf}"] = t
    for (i, leaf), parts in qkv.items():
        state[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat([parts[f"attn.{k}"] for k in ("query", "key", "value")])
    return state


def vit_of(config, tensors):
    """The network of a golden file, float64, without a head."""
    net = Vit(
        "vit", embed_dim=config["d"], depth=config["depth"], num_heads=config["heads"], mlp_ratio=config["mlp"] / config["d"],
        patch_size=config["patch"], img_size=config["img"], num_classes=0,
    ).double().eval()  # fmt: skip
    net.load_state_dict(timm_state(tensors))
    return net
