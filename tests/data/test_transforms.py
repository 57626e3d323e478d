import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from svp.data.splits import Arrays, Encoded, Files, Part
from svp.data.transforms import (
    Augmentation,
    EvalTransform,
    Pictures,
    eval_transform,
    posterize,
    random_box,
    seeded,
    train_transform,
)
from svp.errors import SvpError
from svp.options import describe
from svp.preprocessing import Preprocessing

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of fork

SMALL = Preprocessing((8, 8), resize=8)
RELEASED = Augmentation("timm", (0.08, 1.0), auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.3, erase=0.25)
KINDS = {"crop": Augmentation(), "timm": RELEASED, "none": Augmentation("none")}


def noise(size, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def arrays(count=10, size=16):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Arrays(pixels, np.arange(count) % 3, [f"picture {i}" for i in range(count)])


@pytest.mark.parametrize(
    "size", [(33, 77), (256, 256), (224, 224), (300, 199), (1000, 999), (31, 500), (640, 480), (257, 1024)]
)
@pytest.mark.parametrize("p", [
    Preprocessing((224, 224)), Preprocessing((64, 64), resize=64),
    Preprocessing((224, 224), resize=248, mean=(0.5,) * 3, std=(0.5,) * 3),
    Preprocessing((96, 96), interpolation="bilinear"),
], ids=["224", "64", "vit", "bilinear"])  # fmt: skip
def test_evaluation_is_timms_exactly(size, p):
    from timm.data import create_transform

    crop = p.crop[0]
    ratio = next(r for r in (0.875, 1.0, 0.9) if int(crop / r) == p.shorter_side)
    theirs = create_transform(
        (3, crop, crop), is_training=False, crop_pct=ratio, interpolation=p.interpolation, mean=p.mean, std=p.std
    )
    picture = noise(size)
    assert torch.equal(eval_transform(p)(picture), theirs(picture))


def test_evaluation_of_a_picture_smaller_than_the_crop_pads_like_timm():
    from timm.data import create_transform

    p, picture = Preprocessing((32, 32), resize=20), noise((20, 50))
    theirs = create_transform((3, 32, 32), is_training=False, crop_pct=1.0, mean=p.mean, std=p.std)
    theirs.transforms[0].size = 20
    assert torch.equal(eval_transform(p)(picture), theirs(picture))


def test_exact_goes_straight_to_the_size():
    p = Preprocessing((8, 12), mean=(0.0,) * 3, std=(1.0,) * 3)
    got = eval_transform(p.but(exact=True))(noise((5, 9)))
    want = np.asarray(noise((5, 9)).resize((12, 8), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    assert got.shape == (3, 8, 12) and np.array_equal(got.permute(1, 2, 0).numpy(), want)


def test_the_evaluation_path_loads_no_heavy_package():
    code = (
        "import sys, svp.data.sources, svp.data.transforms, svp.data.sources.parquet, svp.data.sources.folder\n"
        "from svp.preprocessing import Preprocessing as P\n"
        "from PIL import Image\n"
        "svp.data.transforms.eval_transform(P((8, 8)))(Image.new('RGB', (9, 9)))\n"
        "print([m for m in ('timm', 'torchvision', 'sklearn', 'scipy', 'pyarrow', 'torch._dynamo') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# -- augmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_items_follow_from_seed_epoch_and_index_alone(kind):
    def items(seed, epoch, order):
        data = Pictures(arrays(), train_transform(SMALL, KINDS[kind]), seed)
        data.set_epoch(epoch)
        return {i: data[i][0] for i in order}

    first, again = items(0, 1, range(10)), items(0, 1, reversed(range(10)))
    assert all(torch.equal(first[i], again[i]) for i in first)
    for other in (items(1, 1, range(10)), items(0, 2, range(10))):
        same = sum(torch.equal(first[i], other[i]) for i in first)
        assert same == (10 if kind == "none" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_global_generators_are_left_alone(kind):
    data = Pictures(arrays(), train_transform(SMALL, KINDS[kind]))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    want = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    assert [data[i][2] for i in range(10)] == list(range(10))
    assert (random.random(), np.random.rand(), torch.rand(1)) == want


def test_seeded_puts_the_generators_back_after_an_error():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    want = random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3, 4):
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyError
    assert want[:2] == (random.getstate()[1][:5], np.random.get_state()[1][:5].tolist())
    assert torch.equal(torch.get_rng_state(), want[2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_any_number_of_workers_gives_the_same_pictures(kind, cache_bytes):
    def epochs(workers):
        data = Pictures(arrays(), train_transform(SMALL, KINDS[kind]), seed=3, cache_bytes=cache_bytes)
        found = []
        for epoch in range(2):
            data.set_epoch(epoch)
            loader = DataLoader(data, batch_size=4, num_workers=workers)
            found += [torch.cat([batch[k].flatten().double() for batch in loader]) for k in range(3)]
        return found

    alone = epochs(0)
    for workers in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(alone, epochs(workers), strict=True)), workers


@pytest.mark.parametrize("kind", KINDS)
def test_everything_crosses_to_a_worker_by_pickle(kind, tmp_path, paint):
    path = paint(tmp_path / "a.png")
    splits = [
        arrays(), Files([str(path)], [0], str(tmp_path)), Part(arrays(), arrays(3), index=[2, 11]),
        Encoded([path.read_bytes()], np.array([[0, 0, path.stat().st_size]]), [1], ["a"]),
    ]  # fmt: skip
    for split in splits:
        data = Pictures(split, train_transform(SMALL, KINDS[kind]), 7)
        data.set_epoch(2)
        want = [data[i] for i in range(len(split))]
        copy = pickle.loads(pickle.dumps(data))
        for _ in range(2):  # the second time from what the copy keeps
            assert all(torch.equal(copy[i][0], want[i][0]) and copy[i][1:] == want[i][1:] for i in range(len(split)))


@pytest.mark.parametrize("kind", ["crop", "timm"])
def test_mirrored_only_where_the_task_allows(kind):
    """A picture whose left half is black stays so in every draw; with a forced flip it does not."""
    values = np.zeros((16, 16, 3), dtype=np.uint8)
    values[:, 8:] = 255
    split = Arrays(values[None], [0], ["half"])
    a = Augmentation(kind, (0.9, 1.0), (1.0, 1.0))

    def sides(may_flip, force):
        chosen = Augmentation(kind, (0.9, 1.0), (1.0, 1.0), force_flip=force) if force else a
        data = Pictures(split, train_transform(Preprocessing((16, 16), resize=16), chosen, may_flip))
        found = set()
        for epoch in range(30):
            data.set_epoch(epoch)
            image = data[0][0]
            found.add(bool(image[..., 0].mean() < image[..., -1].mean()))
        return found

    assert sides(False, False) == {True} and sides(True, False) == {True, False} and sides(False, True) == {True, False}


def test_exact_sources_are_neither_cropped_nor_mirrored():
    transform = train_transform(SMALL.but(exact=True), Augmentation(), may_flip=True)
    assert type(transform) is EvalTransform and not transform.is_random


def test_random_boxes_stay_inside_and_have_the_asked_size():
    generator = random.Random(0)
    for _ in range(300):
        w, h = generator.randint(1, 60), generator.randint(1, 60)
        left, top, right, bottom = random_box(w, h, (0.08, 1.0), (0.75, 4 / 3), generator)
        assert 0 <= left < right <= w and 0 <= top < bottom <= h
    shares = [(b[2] - b[0]) * (b[3] - b[1]) / 1e6 for b in (random_box(1000, 1000, (0.2, 0.6), (0.75, 4 / 3), generator) for _ in range(400))]  # fmt: skip
    assert 0.19 < min(shares) < 0.22 and 0.55 < max(shares) < 0.61 and abs(np.mean(shares) - 0.4) < 0.02


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (1, 500), (2000, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_shapes_work(size, kind):
    split = Arrays(np.asarray(noise(size))[None], [0], ["thin"])
    image = Pictures(split, train_transform(SMALL, KINDS[kind]))[0][0]
    assert image.shape == (3, 8, 8) and image.isfinite().all()


@pytest.mark.parametrize("bits", range(9))
def test_posterize_is_pillows_and_black_without_bits(bits):
    from PIL import ImageOps

    picture = noise((9, 9))
    want = np.zeros((9, 9, 3)) if bits == 0 else picture if bits == 8 else ImageOps.posterize(picture, bits)
    assert np.array_equal(posterize(picture, bits), want)


def test_released_augmentation_runs_at_every_magnitude():
    """Pillow refuses to posterize to no bits, which the increasing policy asks for at its strongest."""
    data = Pictures(arrays(40, 24), train_transform(SMALL, Augmentation("timm", auto_augment="rand-m10-n15-inc1")))
    assert all(image.isfinite().all() for image, _, _ in data)


def test_every_option_has_a_help_line():
    assert all(row.help for row in describe(Augmentation))


# -- kept pictures and errors ------------------------------------------------------------------------------------------


class Counted(Arrays):
    """Says how often it was asked."""

    asked = 0

    def picture(self, i):
        self.asked += 1
        return super().picture(i)


@pytest.mark.parametrize("kind", KINDS)
def test_small_sets_are_decoded_once(kind):
    base = arrays()
    for cache_bytes, want in ((1 << 20, 10), (0, 30), (1000, 30)):
        split = Counted(base.pixels, base.labels, base.names)
        data = Pictures(split, train_transform(SMALL, KINDS[kind]), cache_bytes=cache_bytes)
        for epoch in range(3):
            data.set_epoch(epoch)
            for i in range(len(data)):
                data[i]
        assert split.asked == (want if (kind, cache_bytes) != ("none", 1000) else 30), (kind, cache_bytes)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="workers are not forked here")
def test_forked_workers_share_what_they_decode(tmp_path, paint):
    """The second epoch works although the files are gone: any worker finds what another has decoded."""
    paths = [str(paint(tmp_path / f"{i}.png", i)) for i in range(12)]
    data = Pictures(Files(paths, [0] * 12), train_transform(SMALL, Augmentation()))
    first = [len(batch[2]) for batch in DataLoader(data, 5, num_workers=2, multiprocessing_context="fork")]
    for path in tmp_path.iterdir():
        path.unlink()
    second = [len(batch[2]) for batch in DataLoader(data, 3, num_workers=2, multiprocessing_context="fork")]
    assert sum(first) == sum(second) == 12


def test_all_splits_of_a_process_share_one_limit(monkeypatch):
    import gc

    from svp.data import kept

    gc.collect()
    monkeypatch.setattr(kept, "LIMIT_BYTES", kept._taken + 2 * 10 * (8 * 8 * 3 + 8))  # two of ten crops each
    data = [Pictures(arrays(), eval_transform(SMALL)) for _ in range(4)]
    assert [d.kept.sizes is not None for d in data] == [True, True, False, False]
    before = kept._taken
    del data
    gc.collect()
    assert kept._taken < before
    assert Pictures(arrays(), eval_transform(SMALL)).kept.sizes is not None


def test_a_picture_larger_than_the_others_is_not_kept(tmp_path, paint):
    paths = [str(paint(tmp_path / f"{i}.png", i, (40, 40) if i == 38 else (8, 8))) for i in range(70)]
    data = Pictures(Files(paths, [0] * 70), train_transform(SMALL, Augmentation()))
    first = [data[i][0] for i in range(70)]
    assert all(torch.equal(data[i][0], first[i]) for i in range(70))
    assert data.kept.slot == 8 * 8 * 3 and not data.kept.sizes[38].any() and data.kept.sizes[37].tolist() == [8, 8]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_keeps_its_sentence(tmp_path, paint, workers):
    paths = [str(paint(tmp_path / f"{i}.png", i)) for i in range(3)]
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    data = Pictures(Files(paths, [0, 1, 0]), eval_transform(SMALL))
    with pytest.raises(SvpError) as caught:
        list(DataLoader(data, 3, num_workers=workers))
    err = caught.value
    assert err.problem.startswith(paths[1]) and "damaged" in err.problem and "\n" not in err.problem
    assert err.kind == "data" and "--on-bad-image skip" in err.hint
    assert json.dumps(err.problem) and err.exit_code == 1
