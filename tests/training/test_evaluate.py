"""Scores against scikit-learn and by hand."""

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from svp.errors import SvpError
from svp.training.evaluate import calibration_error, evaluate, predictions, raw_pixel_baseline, score
from svp.training.machine import Team
from training.small import CLASSES, model, splits

NAMES = tuple("abcdefgh")


def test_scores_are_scikit_learns():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 8)), generator.integers(0, 8, 200)
    found = score(logits, labels, NAMES, "test")
    guess = logits.argmax(-1)
    assert found.accuracy == (guess == labels).mean() and found.count == 200
    assert (found.confusion == confusion_matrix(labels, guess)).all()
    assert found.mean_class_accuracy == pytest.approx(balanced_accuracy_score(labels, guess))
    assert found.top5 == pytest.approx(top_k_accuracy_score(labels, logits, k=5))
    np.testing.assert_allclose(found.probabilities.sum(-1), 1)


def test_a_class_without_pictures_is_left_out():
    found = score(np.eye(3)[[0, 0, 1]] * 9, np.array([0, 1, 1]), ("a", "b", "c"), "test")
    assert found.per_class[0] == 1 and found.per_class[1] == 0.5 and np.isnan(found.per_class[2])
    assert found.mean_class_accuracy == 0.75 and found.top5 == 1.0


def test_calibration_by_hand():
    confidence, right = np.array([0.95, 0.95, 0.55, 1.0]), np.array([True, False, True, True])
    want = (abs(0.95 + 0.95 + 1.0 - 2) + abs(0.55 - 1)) / 4  # the first bin of ten holds three
    assert calibration_error(confidence, right, bins=10) == pytest.approx(want)
    assert calibration_error(np.ones(4), np.ones(4, bool)) == 0


def test_a_worker_that_was_stopped_first_is_no_mistake_of_ours():
    """Ctrl-C reaches workers too: what they die of is told as what it is."""

    def batches():
        yield torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        raise RuntimeError("DataLoader worker exited unexpectedly")

    calls = []

    def between():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predictions(model(), batches(), Team(), torch.device("cpu"), between=between)
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        predictions(model(), batches(), Team(), torch.device("cpu"))


def test_evaluate_leaves_the_model_as_it_was():
    net, data = model(), splits()
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    a, b = evaluate(net, data, "test", batch_size=5), evaluate(net, data, "test", batch_size=12)
    assert net.training and all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-6)
    assert a.classes == CLASSES and a.count == 12


def test_classes_are_matched_by_name():
    net, data = model(), splits()
    net.classes = CLASSES
    turned = data.but(classes=("red", "green", "blue"))
    for part in (turned.train, turned.val, turned.test):
        part.labels = 2 - part.labels
    assert evaluate(net, turned).accuracy == evaluate(net, splits()).accuracy
    with pytest.raises(SvpError, match=r"3 classes.*for example yellow") as err:
        evaluate(net, data.but(classes=("blue", "green", "yellow")))
    assert err.value.kind == "data"
    with pytest.raises(SvpError, match="has 4"):
        evaluate(net, data.but(classes=("blue", "green", "red", "yellow")))


def test_a_split_that_is_not_there():
    with pytest.raises(SvpError, match="no test split"):
        evaluate(model(), splits(test=0))


def test_raw_pixels_of_digits_do_well():
    from svp.data.sources import open_data

    assert 0.95 < raw_pixel_baseline(open_data("digits")) < 0.99
    assert raw_pixel_baseline(splits()) is None
