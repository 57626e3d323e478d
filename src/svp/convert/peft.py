"""LoRA adapters in the layout of the package `peft`, read and written without it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from svp.backbones.base import Backbone
from svp.backbones.checkpoints import Report, read_checkpoint
from svp.errors import SvpError
from svp.methods._layers import is_vit, layers
from svp.methods.lora import EMBED, MAMBA_TARGETS, VIT_TARGETS, Lora
from svp.model import AdaptedModel, adapt, load, read_json, write_folder
from svp.model.folder import CONFIG, TENSORS  # peft names its files so
from svp.seams import Site

FRONT = "base_model.model."
PARTS = {"lora_A.weight": "down", "lora_B.weight": "up", "lora_magnitude_vector": "norm"}
TARGETS = {"x_proj_b": "x_proj", "dt_proj": "dt", "dt_proj_b": "dt"}  # layer: our target where the words differ
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the frozen weights before they train
OTHER_FUNCTIONS = (  # a value here makes another function of the same tensors
    "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "megatron_config", "kasa_config", "monteclora_config",
)  # fmt: skip
HINT = "only plain LoRA, rsLoRA and DoRA can be read"


class Part(NamedTuple):
    """The matrices beside one layer: down (r, in), up (out, r), with DoRA norm (out,); factor multiplies up @ down."""

    down: Tensor
    up: Tensor
    norm: Tensor | None
    alpha: float
    factor: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


# -- reading -----------------------------------------------------------------------------------------------------------


def is_peft(folder: str | Path) -> bool:
    """Whether a folder was written by peft."""
    path = Path(folder) / CONFIG
    return path.is_file() and "peft_type" in read_json(path)


def load_peft(folder: str | Path, backbone: Backbone) -> tuple[AdaptedModel, Report]:
    """A LoRA that peft saved, as an AdaptedModel on the backbone it was trained on: the same logits in evaluation.

    Plain LoRA, rsLoRA and DoRA on the layers of a ViT of timm, or on those of our Vim; layers without matrices in the file
    stay as they are. The head is the file's (modules_to_save=["head"]), else the backbone's own, which peft left frozen.
    Raises SvpError for another kind of adapter, layers or sizes the backbone does not have, and files that are damaged.
    """
    folder = Path(folder)
    config = checked(read_json(folder / CONFIG), folder / CONFIG)
    report, site = Report(), backbone.site()
    if not (folder / TENSORS).is_file():
        raise SvpError(
            f"{folder} has no {TENSORS}", "save_pretrained(…, safe_serialization=True) writes it", "artefact"
        )
    tensors = read_checkpoint(folder / TENSORS).tensors
    parts, head = sorted_out(tensors, config, folder / TENSORS)
    layer_of = dict(linear_layers(site))
    for module in parts:
        if module not in layer_of:
            raise SvpError(
                f"{folder / TENSORS} adapts {module}, which is no linear layer in a block of {backbone.name}",
                "give the backbone it was trained on with --backbone", "artefact",
            )  # fmt: skip
    if not head:
        head = {name: p.detach() for name, p in backbone.head.named_parameters()}
        report.notes.append(f"the file holds no head: that of {backbone.name} is taken, frozen there")
    shapes = {name: tuple(t.shape) for name, t in head.items()}
    classes = shapes.get("weight", (0,))[:1]
    if shapes.get("weight") != (*classes, backbone.num_features) or shapes.get("bias", classes) != classes:
        raise SvpError(
            f"{folder / TENSORS}: no head of {backbone.num_features} inputs there or in {backbone.name}, but {shapes or 'none'}",
            'save it with modules_to_save=["head"]', "artefact",
        )  # fmt: skip
    options = options_for(config, parts, layer_of, VIT_TARGETS if is_vit(site) else MAMBA_TARGETS, report)
    model = adapt(backbone, ("lora", options), num_classes=len(head["weight"]), probe=False)
    fill(model.method, parts, folder / TENSORS)  # type: ignore[arg-type]
    with torch.no_grad():
        model.head.weight.copy_(head["weight"])  # type: ignore[operator, union-attr]
        model.head.bias.copy_(head.get("bias", torch.zeros(())))  # type: ignore[operator, union-attr]
    report.loaded = sorted(tensors)
    report.notes.append("class names and preprocessing are not in this layout: those of the backbone hold")
    return model.eval(), report


def convert_from_peft(source: str | Path, folder: str | Path, backbone: Backbone) -> Report:
    """Write a LoRA that peft saved as a folder that `svp.load` reads."""
    model, report = load_peft(source, backbone)
    model.save_pretrained(folder)
    return report


def checked(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config itself; one sentence for what is no LoRA as we have it."""

    def refuse(name: str, expected: str, hint: str = HINT) -> SvpError:
        return SvpError(f"{path}: {name} is {config.get(name)!r}, expected {expected}", hint, "artefact")

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "'LORA'")
    if config.get("bias", "none") != "none":
        raise refuse("bias", "'none'", "biases are the method bitfit, which composes: svp list methods bitfit")
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        raise refuse("init_lora_weights", "a start that leaves the weights alone", "convert it with peft first (path_initial_model_for_weight_conversion)")  # fmt: skip
    for name in OTHER_FUNCTIONS:
        if config.get(name):
            raise refuse(name, "none")
    for name, least in (("r", 1), ("lora_alpha", -math.inf), ("lora_dropout", 0)):
        value = config.get(name, 0 if name == "lora_dropout" else None)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < least:  # type: ignore[arg-type, operator]
            raise refuse(name, f"a number{'' if least < 0 else f' from {least}'}", "the file was changed by hand; save it again")  # fmt: skip
    if not isinstance(config.get("alpha_pattern") or {}, dict):
        raise refuse("alpha_pattern", "a table of numbers by layer", "the file was changed by hand; save it again")
    return config


def sorted_out(tensors: dict[str, Tensor], config: dict[str, Any], path: Path) -> tuple[dict[str, Part], dict]:
    """{module: its matrices}, and the tensors of the head where the file has one."""
    found: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for key, t in tensors.items():
        name = key.removeprefix(FRONT)
        end = next((end for end in PARTS if name.endswith(f".{end}")), None)
        if end:
            found.setdefault(name.removesuffix(f".{end}"), {})[PARTS[end]] = t
        elif name in ("head.weight", "head.bias"):
            head[name.removeprefix("head.")] = t
        else:
            hint = 'of whole modules only the head can be read: modules_to_save=["head"]'
            raise SvpError(f"{path} holds {key}, which is no part of a LoRA", hint, "artefact")
    if not found:
        raise SvpError(f"{path} holds no LoRA", "save the adapter again", "artefact")
    parts: dict[str, Part] = {}
    for module, rows in found.items():
        wanted = {"down", "up", "norm"} if config.get("use_dora") else {"down", "up"}
        if rows.keys() != wanted:
            raise SvpError(f"{path}: {module} has {', '.join(sorted(rows))}, expected {', '.join(sorted(wanted))}",
                           "the two files do not belong together; copy the adapter again", "artefact")  # fmt: skip
        for what, t in rows.items():
            if what != "norm" and (t.dim() < 2 or not t.numel()):
                raise SvpError(f"{path}: a matrix of {module} is {tuple(t.shape)}, expected two axes", "save the adapter again", "artefact")  # fmt: skip
        norm = rows["norm"].flatten() if "norm" in rows else None
        down, alpha = rows["down"].flatten(1), alpha_of(module, config, path)
        factor = alpha / (math.sqrt(len(down)) if config.get("use_rslora") else len(down))
        parts[module] = Part(down, rows["up"].flatten(1), norm, alpha, factor)
    return parts, head


def alpha_of(module: str, config: dict[str, Any], path: Path) -> float:
    """lora_alpha of a layer: the first pattern that its name ends in, else the common one."""
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            fits = re.match(rf"(.*\.)?({pattern})$", module)
            number = float(value)
        except (re.error, TypeError, ValueError) as err:
            problem = f"{path.with_name(CONFIG)}: alpha_pattern {pattern!r}: {value!r} is none: {err}"
            raise SvpError(problem, "the file was changed by hand; save it again", "artefact") from err
        if fits:
            return number
    return float(config["lora_alpha"])


def linear_layers(site: Site) -> Iterator[tuple[str, str]]:
    """(module, layer) of all that a LoRA can stand beside; norms are left out."""
    yield EMBED.removesuffix(".weight"), "embed"
    for i in range(len(site.blocks)):
        yield from ((name, layer) for layer, name in layers(site, i).items() if "norm" not in layer)


def options_for(
    config: dict[str, Any], parts: dict[str, Part], layer_of: dict[str, str], order: tuple[str, ...], report: Report
) -> dict[str, Any]:
    """Options of our lora for what the file holds; where ranks or scales differ, `fill` pads and folds them."""
    targets = {TARGETS.get(layer_of[module], layer_of[module]) for module in parts}
    ranks, alphas = {part.rank for part in parts.values()}, {part.alpha for part in parts.values()}
    rslora, same = bool(config.get("use_rslora")), len(ranks) == len(alphas) == 1
    if not same:
        report.notes.append("ranks or scales differ from layer to layer: padded to the largest rank, scales folded in")
    dropout = float(config.get("lora_dropout") or 0)
    if dropout and config.get("use_dora"):
        report.notes.append(f"lora_dropout {dropout:g} beside DoRA is left out: it has no branch to drop out of here")
        dropout = 0.0
    elif dropout:
        report.notes.append(
            f"lora_dropout {dropout:g}: peft drops out what a layer reads, here it is the rank-sized code"
        )
    alpha = alphas.pop()
    scale = 1.0 if not same else alpha if rslora else alpha / max(ranks)
    return dict(
        rank=max(ranks), targets=tuple(t for t in order if t in targets), dropout=dropout, scale=scale,
        rslora=rslora and same, dora="row" if config.get("use_dora") else "none",
    )  # fmt: skip


@torch.no_grad()
def fill(method: Lora, parts: dict[str, Part], path: Path) -> None:
    """Put the file's matrices into a lora made for them; a layer that the file leaves alone keeps its zero."""
    for j, (name, _, _) in enumerate(method.slices):
        part, down, up = parts.get(name.removesuffix(".weight")), method.down[j], method.up[j]
        if part is None:
            continue
        r = part.rank
        wanted = {"lora_A": (part.down.shape[1:], down.shape[1:]), "lora_B": (part.up.shape, (len(up), r))}
        if part.norm is not None:
            wanted["lora_magnitude_vector"] = (part.norm.shape, (len(up),))
        for what, (got, fits) in wanted.items():
            if tuple(got) != tuple(fits):
                raise SvpError(
                    f"{path}: {what} of {name} is made for {tuple(got)}, this backbone needs {tuple(fits)}",
                    "give the backbone it was trained on with --backbone", "artefact",
                )  # fmt: skip
        down.zero_()[:r] = part.down
        up.zero_()[:, :r] = part.up if part.factor == method.factor else part.up * (part.factor / method.factor)
        if part.norm is not None:
            method.norm[j].copy_(part.norm[:, None])


# -- writing -----------------------------------------------------------------------------------------------------------


def save_peft(model: AdaptedModel, folder: str | Path) -> Report:
    """Write our LoRA in peft's layout: PeftModel.from_pretrained(network, folder) then gives the same logits.

    The network is the one of timm with as many classes as the model; slices of a fused layer (q, v; X, B, …) become
    matrices of the whole layer, of their ranks' sum and with zeros elsewhere. Raises SvpError where the layout has no place:
    another method, DoRA with a norm for each input, a head of several layers.
    """
    method = model.method
    if not isinstance(method, Lora):
        raise SvpError(f"{model.method_name} has no place in peft's layout", "only lora alone can be written", "usage")
    if not isinstance(model.head, nn.Linear):
        raise SvpError(f"the head {model.head_name} has no place in peft's layout", "--head linear", "usage")
    dora, opt = method.opt.dora != "none", method.opt
    if opt.dora == "column":
        raise SvpError("dora=column has a norm for each input, peft one for each output", "-s lora.dora=row", "usage")
    weights = dict(model.backbone.named_parameters())
    tensors: dict[str, Tensor] = {f"{FRONT}head.{name}": p for name, p in model.head.named_parameters()}
    ranks: dict[str, int] = {}
    for name in dict.fromkeys(name for name, _, _ in method.slices):
        slices = [j for j, (other, _, _) in enumerate(method.slices) if other == name]
        down, up, norm = whole(method, slices, weights[name])
        module, shape = name.removesuffix(".weight"), weights[name].shape
        ranks[module] = len(down)
        tensors[f"{FRONT}{module}.lora_A.weight"] = down.unflatten(1, shape[1:])
        tensors[f"{FRONT}{module}.lora_B.weight"] = up.unflatten(1, (-1, *[1] * (len(shape) - 2)))
        if dora:
            tensors[f"{FRONT}{module}.lora_magnitude_vector"] = norm if len(shape) == 2 else norm.view(1, -1, 1, 1)
    plain = {key: t.detach().to("cpu").contiguous().clone() for key, t in tensors.items()}
    notes = notes_on(model)
    write_folder(Path(folder), {
        CONFIG: (json.dumps(config_of(model, ranks), indent=2) + "\n").encode(),
        TENSORS: save(plain, {"format": "pt"}),
        "README.md": "\n".join(["---", "library_name: peft", "---", "", f"# LoRA on {model.backbone.name}", "", *notes, ""]).encode(),
    })  # fmt: skip
    return Report(loaded=sorted(plain), notes=notes)


def convert_to_peft(source: str | Path, folder: str | Path, backbone: Backbone | None = None) -> Report:
    """Write the adapter in `source`, one of this package, in peft's layout."""
    return save_peft(load(source, backbone), folder)


def whole(method: Lora, slices: list[int], base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slices of one layer as matrices of all of it: down (R, in), up (out, R), norm (out,)."""
    base = base.detach().flatten(1)
    down = torch.cat([method.down[j] for j in slices])
    up, norm = base.new_zeros(len(base), len(down)), base.norm(dim=1)
    first, seen = 0, torch.zeros(len(base), dtype=torch.bool)
    for j in slices:
        _, rows, _ = method.slices[j]
        if method.opt.dora != "none":
            if seen[rows].any():
                raise SvpError(f"the targets {', '.join(method.opt.targets)} norm the same rows twice", "write them one by one", "usage")  # fmt: skip
            norm[rows] = method.norm[j].detach()[:, 0]
        seen[rows] = True
        last = first + len(method.down[j])
        up[rows, first:last] = method.up[j].detach()
        first = last
    return down, up, norm


def config_of(model: AdaptedModel, ranks: dict[str, int]) -> dict[str, Any]:
    """peft's fields; modules are named by how they end in every block."""
    opt: Any = model.method.opt
    vit = is_vit(model.backbone.site())
    ends = {re.sub(r"^(blocks|layers)\.\d+\.", "", module): rank for module, rank in ranks.items()}
    common = max(ends.values())

    def alpha(rank: int) -> float:
        value = opt.scale * (math.sqrt(rank / opt.rank) if opt.rslora else rank)
        return int(value) if value == int(value) else value

    others = {end: rank for end, rank in ends.items() if rank != common}
    auto = {"base_model_class": "VisionTransformer", "parent_library": "timm.models.vision_transformer"}
    return {
        "auto_mapping": auto if vit else None, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": alpha(common), "lora_dropout": opt.dropout,
        "modules_to_save": ["head"], "peft_type": "LORA", "r": common, "rank_pattern": others,
        "alpha_pattern": {end: alpha(rank) for end, rank in others.items()}, "target_modules": list(ends),
        "task_type": None, "use_dora": opt.dora != "none", "use_rslora": opt.rslora,
    }  # fmt: skip


def notes_on(model: AdaptedModel) -> list[str]:
    name = model.backbone.name
    notes = [
        f"Class names and preprocessing have no place in this layout; {name} with {model.num_classes} classes is needed."
    ]
    if not is_vit(model.backbone.site()):
        notes.append(
            "peft wraps the forward of a layer. The published Vim hands raw weights to fused kernels and never calls it: "
            "there this adapter loads without a word and does nothing."
        )
    if model.method.opt.dropout:
        notes.append("In training peft drops out what a layer reads, svp the rank-sized code.")
    return notes
