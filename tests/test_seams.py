"""Every seam, driven by a small method of its own: what passes there reaches the output, and nothing else does."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.model import adapt
from svp.ops import native
from svp.seams import KV, Scan, Seams, Stack, Tokens

DEPTH, D = 3, 16


@pytest.fixture(scope="module")
def net():
    made = create_backbone("vim_tiny", depth=DEPTH, embed_dim=D, d_state=4, patch_size=8, img_size=32, num_classes=5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # every path carries signal, as the golden weights do
        for name, p in made.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p += 0.1 * noise if "A_" in name else noise * (0.2 if p.dim() < 2 else 1 / p[0].numel() ** 0.5)
    return made.double()


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture(scope="module")
def plain(net, images):
    return net.features(images, Seams())


def tokens(b=2, l=5, d=3, residual=True):
    x = torch.arange(b * l * d, dtype=torch.float64).reshape(b, l, d)
    return Tokens(
        x, x * 10 if residual else None, (2,), torch.tensor([0, 1, 3, 4]), torch.empty(0, dtype=torch.long), (2, 2)
    )


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_add_touches_the_patches_only():
    t = tokens()
    out = t.add(torch.ones(2, 4, 3))
    assert torch.equal(out.x[:, 2], t.x[:, 2]) and torch.equal(out.x[:, t.patches], t.x[:, t.patches] + 1)
    assert out.residual is t.residual


def test_put_clears_the_running_sum_there():
    t = tokens()
    out = t.put(torch.full((1, 1, 3), 7.0), torch.tensor([1]))
    assert (out.x[:, 1] == 7).all() and (out.residual[:, 1] == 0).all()
    assert torch.equal(out.residual[:, [0, 2, 3, 4]], t.residual[:, [0, 2, 3, 4]])


@pytest.mark.parametrize("before", [[0], [5], [2, 2], [0, 3, 5]])
def test_drop_is_the_inverse_of_insert(before):
    t = tokens()
    more = t.insert(torch.zeros(1, len(before), 3), before)
    assert more.x.shape[1] == 5 + len(before) and (more.x[:, more.prompts] == 0).all()
    assert torch.equal(more.x[:, more.patches], t.x[:, t.patches]) and torch.equal(more.x[:, more.cls[0]], t.x[:, 2])
    back = more.drop(more.prompts.tolist())
    assert torch.equal(back.x, t.x) and torch.equal(back.residual, t.residual)
    assert back.cls == t.cls and torch.equal(back.patches, t.patches) and not len(back.prompts)


def test_insert_twice_keeps_the_first_prompts():
    once = tokens().insert(torch.ones(1, 1, 3), [0])
    twice = once.insert(torch.full((1, 1, 3), 2.0), [6])
    assert twice.prompts.tolist() == [0, 6]


def test_bad_places_are_refused():
    with pytest.raises(SvpError, match="inserted before"):
        tokens().insert(torch.zeros(1, 2, 3), [3, 1])
    with pytest.raises(SvpError, match="class token"):
        tokens().drop([2])


# -- wrappers ----------------------------------------------------------------------------------------------------------


def test_network_may_run_never_once_or_often(net, images, plain):
    class Never(Seams):
        def network(self, images, run):
            return torch.zeros(len(images), D)

    class Twice(Seams):
        def network(self, images, run):
            first, _ = run(images)
            second, _ = run(images + 1)
            return first - second

    assert not net.features(images, Never()).any()
    torch.testing.assert_close(net.features(images, Twice()), plain - net.features(images + 1))


def test_a_side_stream_travels_to_the_end(net, images):
    class Side(Seams):
        def network(self, images, run):
            feature, side = run(images, side=images.flatten(1)[:, None])
            return feature + side.sum()

        def block(self, tokens, i, run):
            return run(tokens._replace(side=tokens.side + i))

    want = net.features(images) + (images.flatten(1)[:, None] + 0 + 1 + 2).sum()
    torch.testing.assert_close(net.features(images, Side()), want)


def test_blocks_are_numbered_and_show_their_norm(net, images, plain):
    seen = []

    class Watch(Seams):
        acts_before_blocks = True

        def block(self, tokens, i, run):
            seen.append((i, run.norm(tokens.stream).shape, tokens.residual is None))
            return run(tokens)

    assert torch.equal(net.features(images, Watch()), plain)
    assert seen == [(i, (2, 17, D), i == 0) for i in range(DEPTH)]


def test_the_last_norm_and_the_weights_of_a_block_are_in_reach(net, images, plain):
    """Alone and inside a stack: what a second stream needs at its end, and what shares a block's frozen projections."""

    class Looker(Seams):
        def network(self, images, run):
            feature, stream = run(images, side=torch.zeros(2, 1, D, dtype=torch.float64))
            return feature, run.norm(stream)[:, 0]

        def block(self, tokens, i, run):
            assert torch.equal(run.w["mixer.in_proj.weight"], net.layers[i].mixer.in_proj.weight)
            tokens = run(tokens)
            return tokens._replace(side=tokens.stream[:, list(tokens.cls)])

    for seams in (Looker(), Stack([Looker(), Seams()])):
        feature, again = net.features(images, seams)
        assert torch.allclose(feature, plain, rtol=0, atol=1e-12) and torch.allclose(again, plain, rtol=0, atol=1e-12)


def test_inserted_tokens_reach_the_class_token_and_move_it(net, images, plain):
    class Prompt(Seams):
        def block(self, tokens, i, run):
            if i == 0:
                tokens = tokens.insert(torch.ones(1, 3, D, dtype=torch.float64), [0, 8, 17])
                assert tokens.cls == (10,)
            else:
                tokens = tokens.put(torch.ones(1, 3, D, dtype=torch.float64), tokens.prompts)
            return run(tokens)

    assert not torch.allclose(net.features(images, Prompt()), plain)


def test_branch_sees_the_stream_and_its_norm(net, images, plain):
    class Twice(Seams):
        def branch(self, x, h, i, kind, run):
            assert kind == "mixer" and x.shape == h.shape == (2, 17, D)
            return 2 * run(h)

    class Skip(Seams):
        def branch(self, x, h, i, kind, run):
            return torch.zeros_like(x)

    assert not torch.allclose(net.features(images, Twice()), plain)
    embedded = net.embed(images, net.in_force(None)).x
    want = net.pool(torch.nn.functional.rms_norm(embedded, (D,), net.norm_f.weight, 1e-5), net.cls_positions)
    torch.testing.assert_close(net.features(images, Skip()), want)


# -- tables and memory -------------------------------------------------------------------------------------------------


class Scaled(Seams):
    """One tensor times a factor, or an empty slot filled."""

    def __init__(self, name, factor=1.1, fill=None):
        self.name, self.factor, self.fill = name, factor, fill

    def weights(self, w):
        return {self.name: w[self.name] * self.factor if self.fill is None else self.fill}


PATHS = [("reference", torch.float64, ""), ("reference", torch.float32, "")]
PATHS += [("cpu", torch.float32, level) for level in native.levels()]


@pytest.mark.parametrize("kernel,dtype,level", PATHS, ids=lambda x: str(x).removeprefix("torch."))
def test_every_replaced_weight_changes_the_output(net, images, kernel, dtype, level):
    """Nothing is bypassed: each tensor of the network, and each empty bias slot, on every kernel path."""
    net = copy.deepcopy(net).to(dtype)
    net.kernel = kernel
    images = images.to(dtype)
    before = native.isa()
    try:
        if level:
            native.set_isa(level)
        plain = net.features(images, Seams())
        names = [n for n, _ in net.named_parameters() if not n.startswith("head.")]
        assert len(names) == 5 + 17 * DEPTH
        for name in names:
            assert not torch.equal(net.features(images, Scaled(name)), plain), name
        sizes = {"in_proj": 4 * D, "out_proj": D, "x_proj": 1 + 8, "x_proj_b": 1 + 8, "norm_f": D}
        for slot in sorted(net.site_slots()):
            width = sizes[slot.split(".")[-2]]
            assert not torch.equal(net.features(images, Scaled(slot, fill=torch.ones(width, dtype=dtype))), plain), slot
        assert torch.equal(net.features(images, Seams()), plain)
    finally:
        if level:
            native.set_isa(before)


def test_replaced_weights_take_gradients_and_the_frozen_ones_do_not(net, images):
    p = nn.Parameter(net.layers[1].mixer.in_proj.weight.detach().clone())
    net.features(images, Scaled("layers.1.mixer.in_proj.weight", fill=p)).sum().backward()
    assert p.grad.abs().sum() > 0
    assert all(q.grad is None for q in net.parameters())


def test_more_states_than_the_network_was_built_with(net, images, plain):
    """Sizes are read from the tensors in force: two more states with a read-out of zero change nothing."""

    class More(Seams):
        def weights(self, w):
            changed = {}
            for i in range(DEPTH):
                for twin, a in (("", "A_log"), ("_b", "A_b_log")):
                    changed[f"layers.{i}.mixer.{a}"] = nn.functional.pad(w[f"layers.{i}.mixer.{a}"], (0, 2))
                    x = w[f"layers.{i}.mixer.x_proj{twin}.weight"]
                    dt, b, c = x.split([1, 4, 4])
                    changed[f"layers.{i}.mixer.x_proj{twin}.weight"] = torch.cat([dt, b, b[:2], c, 0 * c[:2]])
            return changed

    torch.testing.assert_close(net.features(images, More()), plain)


def test_an_unknown_tensor_name_is_an_error(net, images):
    with pytest.raises(SvpError, match=r"layers\.0\.mixer\.in_proj\.wieght"):
        net.features(images, Scaled("layers.0.mixer.in_proj.wieght", fill=torch.ones(1)))


@pytest.mark.parametrize("layer", ["in_proj", "out_proj"])
def test_beside_adds_a_term_to_a_linear(net, images, plain, layer):
    width = {"in_proj": (D, 4 * D), "out_proj": (2 * D, D)}[layer]
    module = nn.Linear(*width, bias=False).double()

    class Beside(Seams):
        def beside(self, i):
            return {layer: module} if i == 1 else {}

    name = f"layers.1.mixer.{layer}.weight"
    added = Scaled(name, fill=dict(net.named_parameters())[name].detach() + module.weight)
    got = net.features(images, Beside())
    torch.testing.assert_close(got, net.features(images, added))
    assert not torch.allclose(got, plain)


FIELDS = {"h0": (1, 2, 2 * D, 4), "past": (1, 2, 2 * D, 3), "offset": (2, 2 * D, 4), "bias": (2, 2 * D)}


@pytest.mark.parametrize("name", FIELDS)
def test_memory_reaches_both_directions(net, images, plain, name):
    for k in range(2):
        value = torch.zeros(FIELDS[name], dtype=torch.float64)
        (value[:, k] if name in ("h0", "past") else value[k]).fill_(0.5)
        value.requires_grad_()

        class Memory(Seams):
            def memory(self, i, w, value=value):
                assert w["A_log"].shape == (2 * D, 4)
                return Scan(**{name: value}) if i == 1 else None

        out = net.features(images, Memory())
        assert not torch.allclose(out, plain)
        out.sum().backward()
        assert value.grad.abs().sum() > 0


def test_memory_of_another_kind_is_an_error(net, images):
    class Wrong(Seams):
        def memory(self, i, w):
            return KV(torch.zeros(1), torch.zeros(1))

    with pytest.raises(SvpError, match="holds a scan"):
        net.features(images, Wrong())


# -- stacks ------------------------------------------------------------------------------------------------------------


class Plus(Seams):
    """Adds to the picture, to the tokens and to the branch, in an order that can be told."""

    def __init__(self, c, log=None):
        self.c, self.log = c, [] if log is None else log

    def network(self, images, run):
        self.log.append(("network", self.c))
        return run(images + self.c)[0]

    def block(self, tokens, i, run):
        self.log.append(("block", self.c, i))
        return run(tokens.add(torch.full((1, 16, D), self.c, dtype=torch.float64)))

    def branch(self, x, h, i, kind, run):
        self.log.append(("branch", self.c, i))
        return run(h + self.c)


def test_a_stack_nests_first_outermost(net, images):
    log = []
    out = net.features(images, Stack([Plus(0.1, log), Plus(0.2, log)]))
    torch.testing.assert_close(out, net.features(images, Plus(0.1 + 0.2)))
    assert [entry[:2] for entry in log[:4]] == [("network", 0.1), ("network", 0.2), ("block", 0.1), ("block", 0.2)]


def test_a_stack_chains_weights_adds_terms_and_refuses_two_memories(net, images):
    name = "layers.0.mixer.out_proj.weight"
    got = net.features(images, Stack([Scaled(name, 2.0), Scaled(name, 3.0)]))
    torch.testing.assert_close(got, net.features(images, Scaled(name, 6.0)))

    class Same(Seams):
        def beside(self, i):
            return {"out_proj": lambda y: y[..., :D]}

    class Double(Seams):
        def beside(self, i):
            return {"out_proj": lambda y: 2 * y[..., :D]}

    torch.testing.assert_close(net.features(images, Stack([Same(), Same()])), net.features(images, Double()))

    class Memory(Seams):
        def memory(self, i, w):
            return Scan(bias=torch.ones(2, 2 * D, dtype=torch.float64))

    with pytest.raises(SvpError, match="both bring a memory for block 0"):
        net.features(images, Stack([Memory(), Memory()]))


def test_a_stack_acts_where_a_part_does():
    stack = Stack([Scaled("x"), Plus(0.1)])
    assert [s for s in ("network", "block", "branch", "weights", "beside", "memory") if stack.acts(s)] == [
        "network", "block", "branch", "weights",
    ]  # fmt: skip


# -- hooks and foreign wrappers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"])
def test_a_hook_or_a_foreign_wrapper_acts(net, images, plain, layer):
    module = getattr(net.layers[1].mixer, layer)
    hook = module.register_forward_hook(lambda module, args, out: out * 1.5)
    try:
        assert not torch.allclose(net.features(images), plain), layer
    finally:
        hook.remove()

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) + 0.3

    setattr(net.layers[1].mixer, layer, Wrapper(module))
    try:
        assert not torch.allclose(net.features(images), plain), layer
    finally:
        setattr(net.layers[1].mixer, layer, module)
    torch.testing.assert_close(net.features(images), plain)


def wrapped(module):
    """As accelerate wraps: a forward of the instance's own."""
    forward = module.forward
    module.forward = lambda x: forward(x) * 1.5
    return lambda: vars(module).pop("forward")


WAYS = {
    "forward of its own": wrapped,
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda m, g: (g[0] * 1.5,)).remove,
    "backward hook": lambda module: module.register_full_backward_hook(lambda m, gi, go: (gi[0] * 1.5,)).remove,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "dt_proj_b", "out_proj"])
def test_every_kind_of_hook_acts(net, images, layer, way):
    def gradient():
        x = images.clone().requires_grad_()
        net.features(x, Seams()).square().sum().backward()
        return x.grad

    before = gradient()
    remove = WAYS[way](getattr(net.layers[1].mixer, layer))
    try:
        assert not torch.allclose(gradient(), before)
    finally:
        remove()
    torch.testing.assert_close(gradient(), before)


@pytest.mark.parametrize("layer", ["conv1d", "conv1d_b"])
def test_a_hook_on_a_convolution_is_refused(net, images, layer):
    """Its taps go to a kernel, on whichever path: nobody calls it."""
    handle = getattr(net.layers[1].mixer, layer).register_forward_hook(lambda module, args, out: out)
    try:
        with pytest.raises(SvpError, match=f"{layer} of block 1 carries a hook or wrapper"):
            net.features(images, Seams())
    finally:
        handle.remove()


@pytest.mark.parametrize("layer", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
def test_a_hook_acts_on_a_vit_as_on_timms(layer):
    net = create_backbone("vit_nano", depth=2, embed_dim=16, num_heads=2, img_size=16).double()
    plain = (
        VisionTransformer(embed_dim=16, depth=2, num_heads=2, patch_size=8, img_size=16, num_classes=0).double().eval()
    )
    plain.load_state_dict({name: t for name, t in net.state_dict().items() if not name.startswith("head.")})
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = net.features(images, Seams())
        for model in (net, plain):
            model.blocks[1].get_submodule(layer).register_forward_hook(lambda module, args, out: out * 1.5)
        want = plain(images)
        torch.testing.assert_close(net.features(images, Seams()), want)
    assert (want - before).abs().max() > 1e-3


@pytest.mark.parametrize("method,layer", [("bitfit", "dt_proj"), ("lora", "in_proj")])
def test_what_a_hook_would_hide_is_refused(method, layer):
    """The layer itself is called where somebody hooked it: a bias or weight in its place would never be read."""
    net = create_backbone("vim_tiny", depth=2, embed_dim=16, d_state=4, patch_size=8, img_size=16, num_classes=3)
    model = adapt(net, method, num_classes=3)
    handle = getattr(net.layers[1].mixer, layer).register_forward_hook(lambda module, args, out: out)
    with pytest.raises(SvpError, match=rf"{layer} carries a hook or wrapper and a method replaces its"):
        model(torch.randn(1, 3, 16, 16))
    handle.remove()
    model(torch.randn(1, 3, 16, 16))


@pytest.mark.skipif(not native.available, reason=native.reason)
@pytest.mark.parametrize("layer", ["in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"])
def test_a_hook_acts_where_the_mixer_is_one_op(net, images, plain, layer):
    """In float32, on the compiled kernels: the block with the hook takes the path of single ops, to the same numbers."""
    narrow = copy.deepcopy(net).float()
    assert narrow.kernel == "auto"
    hooks = [
        getattr(n.layers[1].mixer, layer).register_forward_hook(lambda module, args, out: out * 1.5)
        for n in (net, narrow)
    ]
    try:
        want = net.features(images)
        torch.testing.assert_close(narrow.features(images.float()).double(), want, rtol=1e-4, atol=1e-4)
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(narrow.features(images.float()).double(), plain, rtol=1e-4, atol=1e-4)
    assert (want - plain).abs().max() > 1e-2


def test_groups_do_not_cross_a_stage():
    from svp.seams import BlockSite, Site

    blocks = tuple(BlockSite(8, stage=s) for s in (0, 0, 1, 1, 1, 2))
    site = Site("x", blocks, {}, frozenset(), (8, 8), 8, (1, 1), (), 8, (0,) * 3, (1,) * 3)
    assert site.groups(2) == [0, 0, 1, 1, 2, 3] and site.groups(100) == [0, 0, 1, 1, 1, 2]
