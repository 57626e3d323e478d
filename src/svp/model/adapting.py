"""`adapt`: a backbone, a method and a new head become one model."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from svp.backbones.base import Backbone, drawn_from, reseed
from svp.errors import SvpError
from svp.methods.base import Method, Several, options_of
from svp.model.adapted import AdaptedModel, miscounted
from svp.registry import method_class
from svp.seams import Seams, Site

HEADS = ("linear", "two_linear")
MethodSpec = str | tuple[str, dict[str, Any]]


def adapt(
    backbone: Backbone,
    method: MethodSpec | Sequence[MethodSpec],
    *,
    num_classes: int,
    head: str | nn.Module = "linear",
    classes: Sequence[str] | None = None,
    seed: int = 0,
    probe: bool = True,
    **options: Any,
) -> AdaptedModel:
    """A backbone with a method and a new head; start values come from `seed`, the global generators are left alone.

    method   a name, or a list that composes: ["svp", ("lora", {"rank": 8})]; `options` belong to a single method
    head     "linear"; "two_linear" (d -> d // 2 -> classes, no activation between); or a module feature -> logits, with
             which an adapter is saved but not loaded: build it again and use load_state_dict
    probe    run the effect probe (`AdaptedModel.probe`)
    Raises SvpError for an unknown method or option, one that cannot act on this backbone, or tensors without effect.
    """
    if not isinstance(backbone, Backbone):
        raise SvpError(f"backbone is {backbone if isinstance(backbone, str) else type(backbone).__name__}, expected a backbone of this package",
                       'svp.create_backbone("vim_nano", weights="default"); any plain ViT by its timm name', "usage")  # fmt: skip
    if isinstance(num_classes, bool) or not hasattr(num_classes, "__index__") or int(num_classes) < 2:
        raise SvpError(
            f"num_classes is {num_classes!r}, expected an integer from 2", "num_classes=data.num_classes", "usage"
        )
    num_classes, seed = int(num_classes), operator.index(seed)
    if classes is not None and len(classes) != num_classes:
        raise miscounted(classes, num_classes)
    specs = _specs(method, options)
    site = backbone.site()
    with drawn_from(seed):
        parts = _built(specs, site, num_classes)
        for _, part in parts:
            part.classes = tuple(classes) if classes is not None else None
        joined = parts[0][1] if len(parts) == 1 else Several(parts)
        reseed(seed)  # again: a head's start values are the same whatever the method drew
        own = joined.make_head(site, num_classes)
        head = "linear" if isinstance(head, str) and head == "method" else head  # as a run of such a method says it
        if own is not None and head != "linear":
            said = f"'{head}'" if isinstance(head, str) else type(head).__name__
            raise SvpError(f"{'+'.join(n for n, _ in specs)} brings a head of its own, beside which head {said} has no place",
                           "leave head out", "usage")  # fmt: skip
        hidden = next((name for name, part in parts if hasattr(part.opt, "head")), None)  # by adapt's own keyword
        made = own if own is not None else _head(head, backbone.num_features, num_classes, hidden)
    head_name = "method" if own is not None else head if isinstance(head, str) else "module"
    specs = [(name, dataclasses.asdict(part.opt)) for name, part in parts]
    model = AdaptedModel(backbone, joined, made, specs, head_name)
    p = next(backbone.parameters())
    model.method.to(p.device, p.dtype)
    model.head.to(p.device, p.dtype)
    model.classes = classes
    if probe:
        model.probe(seed)
    return model


def _specs(method: MethodSpec | Sequence[MethodSpec], options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    single = isinstance(method, str) or (isinstance(method, tuple) and len(method) == 2 and isinstance(method[1], dict))
    specs: list[Any] = [method] if single else list(method)
    pairs = [(spec, {}) if isinstance(spec, str) else (spec[0], dict(spec[1])) for spec in specs]
    if not pairs:
        raise SvpError("no method was given", 'for example "svp"', kind="usage")
    if len({name for name, _ in pairs}) < len(pairs):
        raise SvpError(
            f"a method stands twice in {'+'.join(n for n, _ in pairs)}", "name each method once", kind="usage"
        )
    if options and len(pairs) > 1:
        raise SvpError(
            f"option {next(iter(options))} belongs to no single method",
            '("name", {"option": value}) pairs',
            kind="usage",
        )
    return [(name, {**values, **options}) for name, values in pairs]


def _built(specs: list[tuple[str, dict[str, Any]]], site: Site, num_classes: int) -> list[tuple[str, Method]]:
    """The methods by name; one that holds a memory meets the scans as those beside it leave them."""
    classes: list[type[Method]] = [method_class(name) for name, _ in specs]
    chosen = [(name, cls, options_of(cls, values, name)) for (name, values), cls in zip(specs, classes, strict=True)]
    for name, cls, opt in chosen:
        reason = cls.unfit(site, opt)
        if reason:
            raise SvpError(f"{name} cannot act on {site.name}: {reason}", f"svp list methods {name}", kind="usage")
    more = sum(cls.new_states(opt) for _, cls, opt in chosen)
    wider = dataclasses.replace(site, blocks=tuple(dataclasses.replace(b, n=b.n + more) for b in site.blocks))
    return [
        (name, cls(wider if cls.memory is not Seams.memory else site, opt, num_classes)) for name, cls, opt in chosen
    ]


def _head(head: str | nn.Module, d: int, num_classes: int, hidden: str | None = None) -> nn.Module:
    if isinstance(head, nn.Module):
        own = next(head.parameters(), torch.zeros(0))
        try:
            with torch.no_grad():
                shape = tuple(copy.deepcopy(head).eval()(own.new_zeros(2, d)).shape)
        except RuntimeError as err:
            first = str(err).split("\n")[0]
            raise SvpError(
                f"the head does not take (2, {d}) features: {first}", f"a head of {d} inputs", "usage"
            ) from err
        if shape != (2, num_classes):
            raise SvpError(f"the head makes {shape} of (2, {d}) features, expected (2, {num_classes})", "a head of num_classes outputs", "usage")  # fmt: skip
        return head
    if head not in HEADS:
        hint = f'("{hidden}", {{"head": "{head}"}}) is the option of {hidden}' if hidden else "--head linear"
        raise SvpError(f"head is '{head}', expected {' or '.join(HEADS)}", hint, kind="usage")
    layers = [nn.Linear(d, num_classes)] if head == "linear" else [nn.Linear(d, d // 2), nn.Linear(d // 2, num_classes)]
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)
