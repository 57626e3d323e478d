"""A trained run read back: from which folder, with which weights, and its labels."""

import shutil

import pytest

from svp.backbones.checkpoints import save_backbone
from svp.data.pictures import read_picture
from svp.errors import SvpError
from svp.model import load
from svp.training.loop import fit
from svp.training.trained import Unread, label, read_trained
from training.small import RECIPE, model, splits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a network whose weights lie in a file."""
    folder = tmp_path_factory.mktemp("run")
    adapted = model("linear")
    net = adapted.backbone
    save_backbone(net, folder / "net.safetensors")
    net.weights_from = str(folder / "net.safetensors")
    fit(adapted, splits(), recipe=RECIPE.but(epochs=1), out=folder / "run")
    return folder / "run"


def test_the_run_its_model_and_a_copy_of_it_are_read(run, tmp_path, monkeypatch):
    shutil.copytree(run / "model", tmp_path / "mine")
    assert read_trained(run).home == read_trained(run / "model").home == run
    assert read_trained(tmp_path / "mine").home == tmp_path / "mine" and not read_trained(tmp_path / "mine").result
    monkeypatch.chdir(run / "model")
    assert read_trained(".").result["method"] == "linear"
    assert read_trained(run).batch_size == 64 and read_trained(run).amp("cuda") == "auto"


def test_weights_that_moved(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "mine")
    home, hidden = run.parent / "net.safetensors", tmp_path / "elsewhere.safetensors"
    assert read_trained(run).model().num_classes == 3
    home.rename(hidden)
    try:
        with pytest.raises(SvpError, match="which are not there") as err:
            read_trained(run).model()
        assert "--weights" in err.value.hint
        assert read_trained(run).model(weights=str(hidden)).num_classes == 3
        shutil.copy(hidden, tmp_path / "mine" / "net.safetensors")
        assert read_trained(tmp_path / "mine").model().num_classes == 3
        again = load(tmp_path / "mine")
        assert again.num_classes == 3
        (tmp_path / "mine" / "notes").mkdir()
        (tmp_path / "mine" / "notes" / "a.txt").write_text("kept")
        again.save_pretrained(tmp_path / "mine")  # what else lies there stays: the weights, what somebody wrote
        assert (
            load(tmp_path / "mine").num_classes == 3 and (tmp_path / "mine" / "notes" / "a.txt").read_text() == "kept"
        )
    finally:
        hidden.rename(home)


def test_labels_come_in_order_and_what_is_unread_is_named(run, tmp_path):
    data, adapted = splits(), read_trained(run).model()
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(files):
        data.test.picture(i).save(path)
    assert read_picture(files[0]).size == (20, 20)
    files[3].write_bytes(b"nothing")
    with pytest.raises(SvpError, match=r"3\.png"):
        list(label(adapted, files, batch_size=2))
    found = list(label(adapted, files, batch_size=2, skip=True))
    assert [p.path for p in found] == list(map(str, files))
    assert [isinstance(p, Unread) for p in found] == [False, False, False, True, False]
