"""Vision Transformers as timm names and builds them, behind the seams (arXiv 2010.11929)."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.backbones.base import Backbone, beside, by_block, drop_path, grid_of, linear, pair
from svp.errors import SvpError, unknown
from svp.ops.add_norm import Term
from svp.preprocessing import Preprocessing
from svp.seams import KV, BlockSite, Seams, Site, Tokens, Weights

VARIANTS: dict[str, dict[str, Any]] = {  # timm's names, tag included: those that the papers use; any other works too
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": {},
    "vit_small_patch16_224.augreg_in21k_ft_in1k": {},
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": {},
    "vit_small_patch16_224.augreg_in1k": {},
    "vit_base_patch16_224.augreg_in1k": {},
    "vit_tiny_patch16_224.augreg_in21k": {},
    "vit_small_patch16_224.augreg_in21k": {},
    "vit_base_patch16_224.augreg_in21k": {},
    "vit_base_patch16_224.orig_in21k": {},
    "vit_base_patch16_224.orig_in21k_ft_in1k": {},
    "vit_base_patch16_224.mae": {},
    "vit_base_patch16_224.dino": {},
    "vit_small_patch16_224.dino": {},
    "vit_base_patch16_clip_quickgelu_224.openai": {},
    "vit_base_patch32_clip_quickgelu_224.openai": {},
    "deit_tiny_patch16_224.fb_in1k": {},
    "deit_small_patch16_224.fb_in1k": {},
    "deit_base_patch16_224.fb_in1k": {},
    "deit3_small_patch16_224.fb_in1k": {},
    "deit3_base_patch16_224.fb_in1k": {},
    "vit_nano": dict(embed_dim=116, depth=12, num_heads=4, patch_size=8, img_size=64, num_classes=200),
}


class Vit(Backbone):
    """Any plain VisionTransformer of timm, its tensors under timm's names.

    A name of timm, or for `vit_nano` the keywords of `timm.models.vision_transformer.VisionTransformer`; img_size is an
    int or (H, W). The feature is the class token after the last norm, or the mean of the patches where timm pools so.
    Raises SvpError for a name timm does not know and for a transformer with parts that are not in the formula below.

        x = x + ls1(proj(attention(qkv(norm1(x)))));  x = x + ls2(fc2(act(fc1(norm2(x)))))

    Source: arXiv 2010.11929; timm, models/vision_transformer.py.
    """

    family = "vit"

    def __init__(self, name: str = "vit", *, img_size: int | tuple[int, int] | None = None, **sizes: Any):
        super().__init__()
        net = _from_timm(name, None if img_size is None else pair(img_size), sizes)
        _refuse(name, net)
        self.name, self.depth, self.embed_dim = name, len(net.blocks), net.embed_dim
        self.num_features, self.num_classes = net.num_features, net.num_classes
        self.img_size, self.patch_size = tuple(net.patch_embed.img_size), net.patch_embed.patch_size[0]
        self.stride, self.grid = self.patch_size, grid_of(self.img_size, self.patch_size, self.patch_size)
        self.prefix, self.pools_patches = net.num_prefix_tokens, net.global_pool == "avg"
        self.positions_of_prefix = not net.no_embed_class
        self.drop_path_rate = sizes.get("drop_path_rate", 0.0)
        self.preprocessing = _preprocessing(net.pretrained_cfg, self.img_size)
        for part in ("patch_embed", "blocks", "norm", "norm_pre", "fc_norm", "head"):
            self.add_module(part, getattr(net, part))
        for token in ("cls_token", "reg_token", "pos_embed"):
            self.register_parameter(token, getattr(net, token))

    # -- the function --------------------------------------------------------------------------------------------------

    def embed(self, images: Tensor, w: Weights) -> Tokens:
        """Pictures (b, 3, H, W) -> prefix tokens, then patches, with positions."""
        x = F.conv2d(images, w["patch_embed.proj.weight"], w.get("patch_embed.proj.bias"), self.patch_size)
        x = x.flatten(2).transpose(1, 2)  # (b, h*w, d)
        # under autocast as wide as the tables, as timm has it: the convolution alone is narrow
        prefix = [w[t].expand(len(x), -1, -1) for t in ("cls_token", "reg_token") if t in w]
        positions = w["pos_embed"]
        if self.positions_of_prefix:
            x = torch.cat([*prefix, x], dim=1) + positions
        else:
            x = torch.cat([*prefix, x + positions], dim=1)
        x = layer_norm(self.norm_pre, w, "norm_pre", x)
        places = torch.arange(self.prefix, x.shape[1], device=x.device)
        return Tokens(x, None, self.cls_positions, places, places.new_empty(0), self.grid)

    def run_blocks(self, images, w, seams, side=None, drop_path_rate=0.0, pooled_only=False):
        tokens = self.embed(images, w)._replace(side=side)
        weights = by_block(w, "blocks.")
        for i, layer in enumerate(self.blocks):
            rate = drop_path_rate * i / max(self.depth - 1, 1)
            tokens = self.checkpointed(seams, tokens, i, Block(layer, weights[i], i, seams, rate, self.name))
        return tokens._replace(x=self.last_norm(tokens.x, w))

    def last_norm(self, x: Tensor, w: Weights) -> Tensor:
        return layer_norm(self.norm, w, "norm", x)

    def pooled(self, tokens: Tokens, w: Weights) -> Tensor:
        return layer_norm(self.fc_norm, w, "fc_norm", super().pooled(tokens, w))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        feature = self.pool(x, self.cls_positions, torch.arange(self.prefix, x.shape[1], device=x.device))
        feature = self.fc_norm(feature)
        return feature if pre_logits else self.head(feature)

    @property
    def cls_positions(self) -> tuple[int, ...]:
        return () if self.pools_patches else (0,)

    @property
    def position_rows(self) -> tuple[int, ...]:
        return tuple(range(self.prefix)) if self.positions_of_prefix else ()

    # -- what methods may know -----------------------------------------------------------------------------------------

    def site(self) -> Site:
        blocks = tuple(BlockSite(self.embed_dim, kinds=("attn", "mlp"), heads=b.attn.num_heads) for b in self.blocks)
        p = self.preprocessing
        views = {name: t.detach() for name, t in self.named_parameters()}
        return Site(
            tagged(self.name), blocks, views, self.site_slots(), self.img_size, self.patch_size, self.grid, self.cls_positions,
            self.num_features, p.mean, p.std, self.head if isinstance(self.head, nn.Linear) else None,
        )  # fmt: skip

    def site_slots(self) -> frozenset[str]:
        layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        names = {f"blocks.{i}.{layer}.bias" for i in range(self.depth) for layer in layers} | {"patch_embed.proj.bias"}
        return frozenset(names - set(dict(self.named_parameters())))

    # -- timm's protocol -----------------------------------------------------------------------------------------------

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


class Block:
    """What seams.block gets as `run`: block i with the weights in force."""

    def __init__(self, layer: Any, w: Weights, i: int, seams: Seams, drop: float, name: str):
        self.layer, self.w, self.i, self.seams, self.drop, self.name = layer, w, i, seams, drop, name
        self.extra = seams.beside(i) if seams.acts("beside") else {}

    def __call__(self, tokens: Tokens, terms: tuple[Term, ...] = (), skip: tuple[int, ...] = ()) -> Tokens:
        x = tokens.plus(terms, skip).x
        for kind, run, scale, norm in (("attn", self.attend, "ls1", "norm1"), ("mlp", self.mlp, "ls2", "norm2")):
            h = layer_norm(getattr(self.layer, norm), self.w, norm, x)
            scaled = _Scaled(run, self.w.get(f"{scale}.gamma"))
            y = self.seams.branch(x, h, self.i, kind, scaled) if self.seams.acts("branch") else scaled(h)
            x = x + drop_path(y, self.drop)
        return tokens._replace(x=x)

    def norm(self, x: Tensor) -> Tensor:
        """The block's own first norm, (b, l, d)."""
        return layer_norm(self.layer.norm1, self.w, "norm1", x)

    def attend(self, h: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d): softmax attention; what a method remembers stands before the first key and value."""
        attn = self.layer.attn
        memory = self.seams.memory(self.i, self.w) if self.seams.acts("memory") else None
        qkv = beside(linear(attn.qkv, self.w, "attn.qkv", h), h, self.extra, "qkv")
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (b, heads, l, d/heads) each
        q, k = (layer_norm(getattr(attn, n), self.w, f"attn.{n}", t) for n, t in (("q_norm", q), ("k_norm", k)))
        if memory is not None:
            if not isinstance(memory, KV):
                raise SvpError(f"block {self.i} of {self.name} attends, the method gives it {type(memory).__name__}")
            k, v = (
                torch.cat([m.to(t.dtype).expand(len(t), -1, -1, -1), t], dim=2)
                for m, t in ((memory.k, k), (memory.v, v))
            )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return beside(linear(attn.proj, self.w, "attn.proj", y), y, self.extra, "proj")

    def mlp(self, h: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, d): two layers with the activation between."""
        mlp = self.layer.mlp
        y = mlp.act(beside(linear(mlp.fc1, self.w, "mlp.fc1", h), h, self.extra, "fc1"))
        return beside(linear(mlp.fc2, self.w, "mlp.fc2", y), y, self.extra, "fc2")


class _Scaled:
    """A branch times its layer scale, where the network has one."""

    def __init__(self, run: Any, gamma: Tensor | None):
        self.run, self.gamma = run, gamma

    def __call__(self, h: Tensor) -> Tensor:
        y = self.run(h)
        return y if self.gamma is None else y * self.gamma


def layer_norm(module: nn.Module, w: Weights, name: str, x: Tensor) -> Tensor:
    """LayerNorm over the last axis with the weights in force; nothing where the network has none."""
    if isinstance(module, nn.Identity):
        return x
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), module.eps)  # type: ignore[arg-type]


# -- files -------------------------------------------------------------------------------------------------------------


def published(name: str) -> tuple[str, ...] | None:
    """Where timm's weights of a name lie: (hub repository, files of which the first that exists is meant), or None."""
    import timm

    if VARIANTS.get(name) or not timm.is_model(name):
        return None
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return None
    own = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else ()
    more = ("open_clip_model.safetensors",) if "_clip_" in name else ()
    return cfg.hf_hub_id, *own, "model.safetensors", *more, "pytorch_model.bin"


def tagged(name: str) -> str:
    """A name of timm with its tag: without one its default is meant."""
    import timm

    cfg = timm.get_pretrained_cfg(name) if "." not in name and timm.is_model(name) else None
    return f"{cfg.architecture}.{cfg.tag}" if cfg is not None and cfg.tag else name


CLIP = (  # names in OpenAI's and open_clip's files, and timm's
    (r"transformer\.resblocks\.(\d+)\.", r"blocks.\1."), (r"\.ln_([12])\.", r".norm\1."), (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."), (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^conv1\.", "patch_embed.proj."), (r"^ln_pre\.", "norm_pre."), (r"^ln_post\.", "norm."),
    (r"^class_embedding$", "cls_token"), (r"^positional_embedding$", "pos_embed"), (r"^proj$", "head.weight"),
)  # fmt: skip


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The picture side of a whole CLIP under timm's names; any other network as it is."""
    if "visual.class_embedding" not in tensors:
        return tensors
    found = {}
    for key, t in tensors.items():
        if not key.startswith("visual."):
            continue
        name = key.removeprefix("visual.")
        for pattern, ours in CLIP:
            name = re.sub(pattern, ours, name)
        found[name] = t
    found["cls_token"], found["pos_embed"] = found["cls_token"].reshape(1, 1, -1), found["pos_embed"][None]
    if "head.weight" in found:
        found["head.weight"] = found["head.weight"].T.contiguous()
        found["head.bias"] = torch.zeros(len(found["head.weight"]))  # timm's head has one, CLIP's projection none
    return found


def recognise(tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """Sizes of the plain ViT that these tensors make, or None when they make none."""
    conv, qkv = tensors.get("patch_embed.proj.weight"), tensors.get("blocks.0.attn.qkv.weight")
    if conv is None or qkv is None or conv.dim() != 4:
        return None
    depth = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith("blocks."))
    sizes: dict[str, Any] = dict(embed_dim=conv.shape[0], depth=depth, patch_size=conv.shape[2])
    head = tensors.get("head.weight")
    if head is not None and head.dim() == 2 and head.shape[1] == conv.shape[0]:
        sizes["num_classes"] = head.shape[0]
    return sizes


def compared(name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that a file must have to fit a name and keywords."""
    with torch.device("meta"):
        net = _from_timm(name, None, {k: v for k, v in sizes.items() if k != "img_size"})
    return dict(embed_dim=net.embed_dim, depth=len(net.blocks), patch_size=net.patch_embed.patch_size[0])


# -- building ----------------------------------------------------------------------------------------------------------


def _from_timm(name: str, img_size: tuple[int, int] | None, sizes: dict[str, Any]) -> Any:
    import timm
    from timm.models.vision_transformer import VisionTransformer

    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    if VARIANTS.get(name) or name == "vit":  # a size of ours
        try:
            net: Any = VisionTransformer(**size, **sizes)
        except (AssertionError, RuntimeError, ValueError) as err:  # how timm and torch refuse sizes
            why = str(err).split("\n")[0] or type(err).__name__
            raise SvpError(f"{name}: {why}", f"svp list backbones {name}", "usage") from err
        net.pretrained_cfg = {}
        return net
    if not timm.is_model(name):
        raise unknown("backbone", name, timm.list_models("*vit*") + list(VARIANTS), "svp list backbones")
    try:
        net = timm.create_model(name, pretrained=False, **size, **sizes)
    except RuntimeError as err:
        raise SvpError(f"timm has no {name}: {err}", "svp list backbones", "usage") from err
    if not isinstance(net, VisionTransformer):
        raise SvpError(
            f"{name} is a {type(net).__name__}, expected a plain VisionTransformer", "svp list backbones", "usage"
        )
    return net


def _refuse(name: str, net: Any) -> None:
    """Raise SvpError where the network has a part that `Block` does not compute."""
    from timm.layers import Mlp, PatchEmbed
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block as TimmBlock
    from timm.models.vision_transformer import VisionTransformer

    strange = None
    if type(net) is not VisionTransformer:
        strange = type(net).__name__
    elif type(net.patch_embed) is not PatchEmbed:
        strange = type(net.patch_embed).__name__
    elif any(type(block) is not TimmBlock for block in net.blocks):
        strange = next(type(block).__name__ for block in net.blocks if type(block) is not TimmBlock)
    elif net.global_pool not in ("token", "avg") or net.attn_pool is not None:
        strange = f"pooling '{net.global_pool}'"
    elif net.global_pool == "avg" and net.pool_include_prefix:
        strange = "a mean over class tokens too"
    elif not isinstance(net.patch_embed.norm, nn.Identity):
        strange = "a norm in its patch embedding"
    elif any(part.p for part in net.modules() if isinstance(part, nn.Dropout)) or (
        net.patch_drop is not None and not isinstance(net.patch_drop, nn.Identity)
    ):
        strange = "dropout of its own"
    elif net.pos_embed is None:
        strange = "no position table"
    plain: list[Any] = [] if strange else list(net.blocks)
    for block in plain:
        parts = (
            (block.attn, Attention), (block.mlp, Mlp), (block.norm1, nn.LayerNorm), (block.norm2, nn.LayerNorm),
        )  # fmt: skip
        strange = strange or next(
            (
                type(p).__name__
                for p, kind in parts
                if type(p) is not kind and not (kind is nn.LayerNorm and isinstance(p, kind))
            ),
            None,
        )
        if strange is None and not (
            isinstance(block.attn.norm, nn.Identity) and isinstance(block.mlp.norm, nn.Identity)
        ):
            strange = "norms inside a branch"
        if strange is None and getattr(block.attn, "gate", None) is not None:
            strange = "gated attention"
    if strange:
        raise SvpError(
            f"{name} has {strange}, which is not offered",
            "a plain ViT, for example deit_small_patch16_224.fb_in1k",
            "usage",
        )


def _preprocessing(cfg: Any, img_size: tuple[int, int]) -> Preprocessing:
    """What timm's configuration says of the weights; for our own: no margin around 64 pixels."""
    if not cfg:
        return Preprocessing(img_size, resize=max(img_size) if max(img_size) <= 64 else None)
    values = cfg.to_dict() if hasattr(cfg, "to_dict") else dict(cfg)
    return Preprocessing(
        img_size, resize=int(max(img_size) / values["crop_pct"]), mean=tuple(values["mean"]), std=tuple(values["std"]),
        interpolation=values["interpolation"],
    )  # fmt: skip
