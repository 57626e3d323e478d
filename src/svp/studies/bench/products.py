"""The floor of a step: the bare matrix products that it cannot do without, with their outputs allocated before.

Counted are the linear layers of the blocks and of SVP's prompters, with every token. Left out, as they are small or no
matrix products: patch embedding, head, convolution, scan, norms.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svp.backbones.base import Backbone
from svp.model import AdaptedModel

FORWARD, INPUT, WEIGHT = "forward", "input gradient", "weight gradient"


class Product(NamedTuple):
    """One matrix product of the step: `rows` tokens through a layer of `inputs` x `outputs`, or one of its gradients."""

    name: str
    kind: str
    rows: int
    inputs: int
    outputs: int
    is_method: bool

    @property
    def mac(self) -> int:
        """Multiply-adds; the same for all three kinds."""
        return self.rows * self.inputs * self.outputs


def layers_of(net: Backbone, rows: int) -> list[Product]:
    """The linear layers of every block in a forward pass over `rows` tokens (all pictures of a batch)."""
    found = []
    for i, block in enumerate(net.site().blocks):
        d, e, n, r = block.width, block.e, block.n, block.r
        sizes = [("in_proj", d, 2 * e), ("out_proj", e, d)]
        for twin in ("", "_b")[: block.k]:
            sizes += [(f"x_proj{twin}", e, r + 2 * n), (f"dt_proj{twin}", r, e)]
        found += [Product(f"layers.{i}.mixer.{name}", FORWARD, rows, k, o, False) for name, k, o in sizes]
    return found


def prompters_of(model: AdaptedModel, rows: int) -> list[Product]:
    """The products of SVP's generators, those of the cross path once for each block that uses them; () of other methods."""
    method: Any = model.method
    if [name for name, _ in model.specs] != ["svp"]:
        return []
    found = []
    for i in method.prompted:
        for path, key in (("inner", i), ("cross", method.group[i])):
            made = getattr(method, path)
            if str(key) in made:
                found += [
                    Product(f"{path}.{key}.{name.removesuffix('.weight')} at {i}", FORWARD, rows, p.shape[1], p.shape[0], True)
                    for name, p in made[str(key)].named_parameters()
                    if p.dim() == 2
                ]  # fmt: skip
    return found


def inference(model: AdaptedModel, batch_size: int) -> list[Product]:
    """A forward pass of the backbone; the method's products are not counted."""
    return layers_of(model.backbone, batch_size * tokens_of(model.backbone))


def training(model: AdaptedModel, batch_size: int) -> list[Product]:
    """Forward, input gradients down to the first prompt, weight gradients of the prompters alone.

    What lies below the first prompt gets no gradient: the prompters of the first prompted block read a frozen input. A
    method that touches no block needs no gradient of the backbone at all.
    """
    net = model.backbone
    layers = layers_of(net, batch_size * tokens_of(net))
    prompts = prompters_of(model, batch_size * net.grid[0] * net.grid[1])
    method: Any = model.method
    first = min(method.prompted) if prompts else 0
    backward = [] if model.frozen_features else [p for p in layers if int(p.name.split(".")[1]) >= first]
    last_of_first = {p.name.split(" at ")[0] for p in prompts if p.name.endswith(f".up at {first}")}
    above = [p for p in prompts if not p.name.endswith(f" at {first}") or p.name.split(" at ")[0] in last_of_first]
    return [
        *layers, *prompts,
        *(p._replace(kind=INPUT) for p in [*backward, *above]),
        *(p._replace(kind=WEIGHT) for p in prompts),
    ]  # fmt: skip


def tokens_of(net: Backbone) -> int:
    """Tokens of a picture, class tokens included."""
    return net.grid[0] * net.grid[1] + len(net.cls_positions)


def mac(products: Iterable[Product]) -> int:
    return sum(p.mac for p in products)


def counts(model: AdaptedModel) -> dict[str, Any]:
    """Multiply-adds of a forward pass by the formulas, of one token in one block, and of a picture."""
    net = model.backbone
    layers, prompts, tokens = layers_of(net, 1), prompters_of(model, 1), tokens_of(net)
    return {
        "parts": parts_of([*layers, *prompts], net.depth), "tokens": tokens, "mac_per_token_and_block": mac(layers) / net.depth,
        "method_mac_per_token_and_block": mac(prompts) / net.depth,
        "gmac_train": mac(training(model, 1)) / 1e9, "gmac_infer": mac(inference(model, 1)) / 1e9,
        "exponentials": sum(tokens * block.e * block.n * block.k for block in net.site().blocks),
    }  # fmt: skip


def parts_of(listed: Iterable[Product], depth: int) -> dict[str, float]:
    """Multiply-adds by the kind of layer, both directions together, in the mean over blocks."""
    found: dict[str, float] = {}
    for p in listed:
        words = p.name.split(" at ")[0].split(".")
        name = words[0] if p.is_method else words[-1].removesuffix("_b")
        found[name] = found.get(name, 0.0) + p.mac / depth
    return found


class Floor:
    """The products, ready to run: each with the weight of its layer, inputs and outputs shared by those of one shape."""

    def __init__(self, model: AdaptedModel, products: list[Product], dtype: torch.dtype = torch.float32):
        device = next(model.backbone.parameters()).device
        weights = {**dict(model.backbone.named_parameters()), **dict(model.method.named_parameters())}
        shared: dict[tuple[int, int, str], Tensor] = {}

        def buffer(rows: int, columns: int, role: str) -> Tensor:
            if (rows, columns, role) not in shared:
                shared[rows, columns, role] = torch.rand(rows, columns, device=device, dtype=dtype)
            return shared[rows, columns, role]

        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        cast: dict[str, Tensor] = {}
        for p in products:
            name = f"{p.name.split(' at ')[0]}.weight"
            w = cast.setdefault(name, weights[name].detach().to(dtype))  # (outputs, inputs)
            x, y = buffer(p.rows, p.inputs, "in"), buffer(p.rows, p.outputs, "in")
            if p.kind == FORWARD:
                self.calls.append((x, w.t(), buffer(p.rows, p.outputs, "out")))
            elif p.kind == INPUT:
                self.calls.append((y, w, buffer(p.rows, p.inputs, "out")))
            else:
                self.calls.append((y.t(), x, buffer(p.outputs, p.inputs, "out")))

    def run(self) -> None:
        for a, b, out in self.calls:
            torch.mm(a, b, out=out)
