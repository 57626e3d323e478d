"""Smoothing and mixing against timm, and mixing that chance alone does not decide."""

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from svp.training.feed import chance
from svp.training.losses import Criterion, Mixer
from svp.training.recipe import Recipe

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
MIXED = Recipe(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
CPU = torch.device("cpu")


def test_smoothed_labels_are_timms():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Criterion(0.1)(logits, LABELS), LabelSmoothingCrossEntropy(0.1)(logits, LABELS))
    soft = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).softmax(-1)
    torch.testing.assert_close(Criterion(0.1)(logits, soft), SoftTargetCrossEntropy()(logits, soft))


def test_mixing_follows_from_the_numbers_alone():
    mixer = Mixer(MIXED, 4)
    seen = []
    for step in (0, 1, 2, 3, 0):
        with chance(CPU, 0, 0, step):
            seen.append(mixer(IMAGES, LABELS))
    assert torch.equal(seen[0][0], seen[4][0]) and torch.equal(seen[0][1], seen[4][1])
    assert not all(torch.equal(seen[0][0], other) for other, _ in seen[1:4])


def test_mixed_targets_sum_to_one_and_inputs_stay():
    kept = IMAGES.clone()
    for step in range(10):
        with chance(CPU, step):
            images, targets = Mixer(MIXED, 4)(IMAGES, LABELS)
        torch.testing.assert_close(targets.sum(-1), torch.ones(6))
        assert images.shape == IMAGES.shape
    assert torch.equal(IMAGES, kept)


def test_an_odd_last_picture_stays_whole():
    mixer = Mixer(MIXED, 4)
    for count in (1, 3, 5):
        with chance(CPU, count):
            images, targets = mixer(IMAGES[:count], LABELS[:count])
        assert torch.equal(images[-1], IMAGES[count - 1])
        want = torch.full((4,), 0.1 / 4)
        want[LABELS[count - 1]] += 0.9
        torch.testing.assert_close(targets[-1], want)


def test_some_batches_stay_whole():
    mixer, mixed = Mixer(MIXED.but(mixup_prob=0.5), 4), []
    for step in range(40):
        with chance(CPU, step):
            mixed.append(not torch.equal(mixer(IMAGES, LABELS)[0], IMAGES))
    assert 10 < sum(mixed) < 30


def test_chance_leaves_the_generators_alone():
    import random

    import numpy as np

    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with chance(CPU, 1, 2):
        torch.rand(3), random.random(), np.random.rand()
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
