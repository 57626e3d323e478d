"""What every method shares: the seams, plus what is not a place: options, head, phases, loss, groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from svp.errors import SvpError
from svp.options import build
from svp.preprocessing import Preprocessing
from svp.seams import SEAMS, Seams, Site, Stack, Weights


@dataclass(frozen=True)
class Phase:
    """A stretch of training. begin(run) may look at data and change parameters, masks and options before it."""

    recipe: Any
    begin: Callable[[Any], None] | None = None


class Method(Seams, nn.Module):
    """How a backbone is adapted. Parameters are what is trained; buffers (maps, masks, prototypes) are saved too.

    A subclass has a frozen dataclass `Options` and builds its parameters in `__init__` from the site.
    `params_formula` and `paper` are shown by `svp list methods NAME`; `default_lr` is the learning rate of our own
    recipes; `known_inert` names patterns of tensors that a batch of two pictures can leave untouched. Of methods that act
    together the one with the lowest `order` is outermost and changes weights first, whatever the order of their names.
    Beside one that `counts_tokens` no other may insert tokens (`inserts`). `classes` are the names of the classes, where
    they were given: known to `make_head` and later.
    """

    @dataclass(frozen=True)
    class Options:
        """No options."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    paper: ClassVar[str] = ""
    params_formula: ClassVar[str] = ""
    default_lr: ClassVar[float] = 1e-2
    known_inert: tuple[str, ...] = ()
    inserts: bool = False
    counts_tokens: bool = False
    classes: tuple[str, ...] | None = None
    # -2: takes pictures of its own, or replaces all weights; -1: reads what nobody has changed; 1: changes shapes
    order: int = 0

    def __init__(self, site: Site, opt: Any, num_classes: int):
        super().__init__()
        self.opt = self.given = opt  # training may fill in what was left to it
        self.num_classes = num_classes

    @classmethod
    def unfit(cls, site: Site, opt: Any) -> str | None:
        """Why this method cannot act on this site, or None."""
        return None

    @classmethod
    def new_states(cls, opt: Any) -> int:
        """How many states it adds to every scan: what others hold before the first token has them too."""
        return 0

    @classmethod
    def label(cls, site: Site, opt: Any) -> str | None:
        """How tables call this method where it is not the published one, for example "e2vpt_in"; None: it is."""
        return None

    def preprocessing(self, p: Preprocessing) -> Preprocessing:
        """Another input size or normalisation than the backbone's; `order` is then -2."""
        return p

    def make_head(self, site: Site, num_classes: int) -> nn.Module | None:
        """A module feature (b, d) -> logits (b, num_classes) of the method's own; None: the head asked for in `adapt`."""
        return None

    def phases(self, recipe: Any) -> list[Phase]:
        """How training goes: one stretch by the recipe, or several with `recipe.but(…)` and a look at the data before each."""
        return [Phase(recipe)]

    def start_epoch(self, run: Any, epoch: int) -> None:
        """Before each epoch: label maps."""

    def loss(self, model: nn.Module, images: Tensor, target: Tensor, criterion: Callable) -> Tensor:
        """images (b, 3, H, W), target (b,) labels or (b, C) shares -> the mean loss; `model` may be the compiled one."""
        return criterion(model(images), target)

    def after_step(self) -> None:
        """After each step: clamps."""

    def groups(self) -> dict[str, dict[str, float]]:
        """{name pattern: dict(lr=, lr_scale=, decay=, decay_scale=, clip=, clip_value=)} for tensors with a rule of their own."""
        return {}

    def merged(self, weights: Weights) -> Weights | None:
        """The tensors of a plain backbone that acts the same, or None when there is none."""
        return self.folded({**weights, **self.weights(weights)} if self.acts("weights") else weights)

    def folded(self, weights: Weights) -> Weights | None:
        """These weights, in force, with what the method does beside or before layers in them; None: it does what is no weight."""
        return None if any(self.acts(seam) for seam in SEAMS if seam != "weights") else weights


def parts_of(method: Method) -> list[Method]:
    """The methods that act together, in the order of their names; of one alone itself."""
    return list(method.parts.values()) if isinstance(method, Several) else [method]  # type: ignore[arg-type]


def options_of(cls: type[Method], values: dict[str, Any], name: str) -> Any:
    """The method's Options from a preset and plain values; what is given besides the preset wins."""
    values = dict(values)
    preset = values.pop("preset", None)
    if preset is not None and preset not in cls.PRESETS:
        known = ", ".join(cls.PRESETS) or "none"
        raise SvpError(f"method {name} has no preset '{preset}'", f"its presets: {known}", kind="usage")
    return build(cls.Options, {**cls.PRESETS.get(preset, {}), **values}, f"method {name}", f"svp list methods {name}")


class Several(Method):
    """Methods that act together: `svp+lora`. Wrappers nest by `order`, then by the names' (the first is outermost)."""

    def __init__(self, parts: Sequence[tuple[str, Method]]):
        nn.Module.__init__(self)
        self.names = tuple(name for name, _ in parts)
        self.opt = {name: dataclasses.asdict(part.opt) for name, part in parts}
        self.num_classes = parts[0][1].num_classes
        self.parts = nn.ModuleDict(dict(parts))
        self.known_inert = tuple(f"parts.{name}.{pattern}" for name, part in parts for pattern in part.known_inert)
        for name, part in parts:
            others = [other for other, beside in parts if beside is not part and beside.inserts]
            if part.counts_tokens and others:
                problem = f"{name} counts the tokens of the sequence, beside it {others[0]} would insert others"
                raise SvpError(problem, "combine only one of them", kind="usage")
        ordered = sorted((part for _, part in parts), key=lambda part: part.order)
        self.stack = Stack(ordered)

    @property
    def acts_before_blocks(self):
        return self.stack.acts_before_blocks

    def acts(self, seam):
        return self.stack.acts(seam)

    def network(self, images, run):
        return self.stack.network(images, run)

    def block(self, tokens, i, run):
        return self.stack.block(tokens, i, run)

    def branch(self, x, h, i, kind, run):
        return self.stack.branch(x, h, i, kind, run)

    def weights(self, w):
        return self.stack.weights(w)

    def beside(self, i):
        return self.stack.beside(i)

    def memory(self, i, w):
        return self.stack.memory(i, w)

    def folded(self, weights):
        # what changes the input of a layer comes last: what stands beside the layer reads it too
        for part in sorted(self.stack.parts, key=lambda part: part.acts("branch")):
            found = part.folded(weights)
            if found is None:
                return None
            weights = found
        return weights

    def preprocessing(self, p):
        for part in self.parts.values():
            p = part.preprocessing(p)
        return p

    def make_head(self, site, num_classes):
        heads = [(name, h) for name, part in self.parts.items() if (h := part.make_head(site, num_classes)) is not None]
        return only_one(heads, "bring a head")

    def phases(self, recipe):
        busy = only_one(
            [(name, part) for name, part in self.parts.items() if type(part).phases is not Method.phases],
            "train in phases",
        )
        return busy.phases(recipe) if busy is not None else [Phase(recipe)]

    def start_epoch(self, run, epoch):
        for part in self.parts.values():
            part.start_epoch(run, epoch)

    def loss(self, model, images, target, criterion):
        own = only_one(
            [(name, part) for name, part in self.parts.items() if type(part).loss is not Method.loss], "have a loss"
        )
        return own.loss(model, images, target, criterion) if own is not None else criterion(model(images), target)

    def after_step(self):
        for part in self.parts.values():
            part.after_step()

    def groups(self):
        found = [(n, key, rule) for n, part in self.parts.items() for key, rule in part.groups().items()]
        return {key if key.startswith("head.") else f"parts.{n}.{key}": rule for n, key, rule in found}


def only_one(found: Sequence[tuple[str, Any]], what: str) -> Any:
    """The one thing that is found, by its method's name, or None; two of their own are an error."""
    if len(found) > 1:
        problem = f"{' and '.join(name for name, _ in found)} both {what} of their own"
        raise SvpError(problem, "combine only one of them", "usage")
    return found[0][1] if found else None


def fresh_linear(d_in: int, d_out: int, bias: bool = True, init: str = "torch") -> nn.Linear:
    """A linear layer started as the source says: "torch" (its default), "zero" (weight and bias 0), "trunc02" (std 0.02, bias 0)."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    with torch.no_grad():
        if init == "zero":
            layer.weight.zero_()
        elif init == "trunc02":
            nn.init.trunc_normal_(layer.weight, std=0.02)
        if init != "torch" and bias:
            layer.bias.zero_()
    return layer
