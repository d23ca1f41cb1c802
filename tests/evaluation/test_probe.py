"""Probes: accuracies of sets that are known to be separable or not, and splits that do not overlap."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from patch_tokenizer import make_batches, make_tokenizer
from PIL import Image

from vistok.cli.hydra_app import configs_folder
from vistok.evaluation.models import NamedModel
from vistok.evaluation.probe import Labelled, collect, probe, probe_bundle, relabel, split


def coloured(count=24):
    """Pictures of one colour each; the class is whether it is bright."""
    labels = torch.arange(count) % 2
    images = (labels * 1.0 - 0.5).view(-1, 1, 1, 1) + 0.1 * torch.rand(count, 3, 8, 8)
    return {"images": images, "labels": labels, "keys": [f"{number}.png" for number in range(count)], "bad": []}


@pytest.mark.parametrize("features", ["encoder", "codes"])
@pytest.mark.parametrize("pooling", ["mean", "flatten"])
def test_classes_that_differ_in_brightness_are_told_apart(features, pooling):
    pictures = collect(make_tokenizer(), [coloured()], features, pooling)
    accuracies = probe(*split(pictures, 0.3), neighbours=3)
    assert accuracies["linear"] == accuracies["knn"] == 1.0
    assert accuracies["majority"] < 1


def test_labels_that_mean_nothing_are_not_learned():
    rows = torch.randn(400, 3)
    labels = torch.randint(0, 2, (400,))
    pictures = Labelled(rows, labels, [str(number) for number in range(400)])
    accuracies = probe(*split(pictures, 0.5))
    assert all(0.3 < value < 0.7 for value in accuracies.values())


@pytest.mark.parametrize(("pooling", "dim"), [("mean", 3), ("flatten", 12)])
def test_rows_are_pooled_or_flattened(pooling, dim):
    assert collect(make_tokenizer(), [coloured()], pooling=pooling).rows.shape == (24, dim)


def test_a_split_has_every_picture_once_whatever_their_order():
    pictures = collect(make_tokenizer(), [coloured()])
    fitted, tested = split(pictures, 0.3)
    assert sorted(fitted.keys + tested.keys) == sorted(pictures.keys)
    order = torch.randperm(24)
    shuffled = Labelled(pictures.rows[order], pictures.labels[order], [pictures.keys[number] for number in order])
    assert set(split(shuffled, 0.3)[1].keys) == set(tested.keys)


def test_labels_of_two_sets_are_compared_by_the_names_of_their_classes():
    tested = Labelled(torch.zeros(3, 1), torch.tensor([0, 1, 0]), ["a", "b", "c"])
    assert relabel(tested, ["cat", "emu"], ["cat", "dog", "emu"]).labels.tolist() == [0, 2, 0]
    assert relabel(tested, [], ["cat", "dog"]).labels.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"classes elk are tested on .* fitted on, cat, dog"):
        relabel(tested, ["cat", "elk"], ["cat", "dog"])


def paint(folder, **classes):
    """A folder of pictures of one colour each; the last one of each class is no picture."""
    for name, value in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (8, 8), (value + number,) * 3).save(folder / name / f"{number}.png")
        (folder / name / "broken.png").write_bytes(b"no picture")


def test_a_probe_of_two_folders_knows_their_classes_and_lists_what_was_unreadable(tmp_path, monkeypatch):
    paint(tmp_path / "fit", bright=220, dark=10, middle=120)
    paint(tmp_path / "test", dark=10, middle=120)
    monkeypatch.setattr("vistok.evaluation.probe.open_models", lambda _: [NamedModel("patch", make_tokenizer())])
    overrides = ["bundle=patch", f"data.val_root={tmp_path}/test", f"fit.val_root={tmp_path}/fit"]
    overrides += [f"{data}.{setting}" for data in ("data", "fit") for setting in ("image_size=8", "num_workers=0")]
    overrides += ["data@fit=image_folder", "neighbours=1", "device=cpu"]
    with initialize_config_dir(str(configs_folder()), version_base="1.3"):
        config = compose("probe", overrides=overrides)
    accuracies = probe_bundle(config, tmp_path, "command")
    assert accuracies["linear"] == 1.0
    for folder in (tmp_path, tmp_path / "fit"):
        assert "broken.png" in (folder / "bad_samples.csv").read_text()
    config.neighbours = "many"
    (tmp_path / "probe.json").unlink()
    with pytest.raises(ValueError, match="neighbours must be a whole number, got 'many'"):
        probe_bundle(config, tmp_path, "command")


def test_pictures_without_labels_are_refused():
    with pytest.raises(ValueError, match="no labels"):
        collect(make_tokenizer(), make_batches(2))


def test_no_pictures_are_refused():
    with pytest.raises(ValueError, match="no picture"):
        collect(make_tokenizer(), [])


@pytest.mark.parametrize(("features", "pooling"), [("pixels", "mean"), ("codes", "max")])
def test_an_unknown_choice_is_refused(features, pooling):
    with pytest.raises(ValueError, match="must be one of"):
        collect(make_tokenizer(), [coloured()], features, pooling)


@pytest.mark.parametrize("share", [0.0, 1.0, 1e-9])
def test_a_share_that_leaves_nothing_is_refused(share):
    with pytest.raises(ValueError, match="test_share"):
        split(collect(make_tokenizer(), [coloured()]), share)


def test_one_class_is_refused():
    pictures = collect(make_tokenizer(), [coloured()])
    one = pictures._replace(labels=torch.zeros(24, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least 2 classes"):
        probe(one, one)


@pytest.mark.parametrize("options", [{"c": 0.0}, {"neighbours": 0}])
def test_a_setting_that_is_not_positive_is_refused(options):
    pictures = collect(make_tokenizer(), [coloured()])
    with pytest.raises(ValueError, match="positive"):
        probe(pictures, pictures, **options)
