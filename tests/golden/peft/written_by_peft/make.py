"""Adapters as the package `peft` writes them for a ViT of timm, and what it computes with them: the files beside this one.

    python tests/golden/peft/written_by_peft/make.py          (written with peft 0.21.2, timm 1.0.31, torch 2.14.1)

base.safetensors   the network's tensors, float64; `images`; `logits.CASE` of the network with each adapter on it
CASE/              adapter_config.json and adapter_model.safetensors, untouched
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

HERE = Path(__file__).parent
SIZES = dict(embed_dim=16, depth=2, num_heads=2, patch_size=4, img_size=16, num_classes=5)
CASES = {
    "lora": dict(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=["attn.qkv", "attn.proj"], modules_to_save=["head"]),
    "dora_rslora": dict(r=2, lora_alpha=4, use_dora=True, use_rslora=True, target_modules=["qkv", "fc1", "fc2"]),
    "patterns": dict(
        r=2, lora_alpha=2, rank_pattern={"fc1": 4}, alpha_pattern={"fc1": 16}, modules_to_save=["head"],
        target_modules=r"blocks\.1\..*(qkv|fc1)|patch_embed\.proj",
    ),
}  # fmt: skip


def base():
    torch.manual_seed(0)
    net = VisionTransformer(**SIZES).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn_like(p)
    return net


def main():
    found = {**base().state_dict(), "images": torch.randn(3, 3, 16, 16, dtype=torch.float64)}
    for name, config in CASES.items():
        model = get_peft_model(base(), LoraConfig(**config, init_lora_weights=False)).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn_like(p)
            found[f"logits.{name}"] = model(found["images"])
        model.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink()
        said = json.loads((HERE / name / "adapter_config.json").read_text())
        print(name, said["peft_version"], found[f"logits.{name}"][0, :2].tolist())
    save_file(found, HERE / "base.safetensors")


if __name__ == "__main__":
    main()
