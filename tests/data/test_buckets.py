"""Aspect-ratio buckets."""

import jaxtyping
import pytest
import torch
from PIL import Image, ImageFile

from vistok.data import BucketBatchSampler, BucketFolderData, CoverTransform, MixtureData
from vistok.data.buckets import assign, bucket_sizes, picture_shape
from vistok.data.decode import BadImageError
from vistok.data.transforms import sample_generator


@pytest.fixture
def folder(tmp_path):
    """Eight wide, eight tall and two square pictures for training, one for evaluation."""
    shapes = [(40, 20)] * 8 + [(20, 40)] * 8 + [(30, 30)] * 2
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    for number, shape in enumerate(shapes):
        Image.new("RGB", shape, (number, 0, 0)).save(tmp_path / "train" / f"{number:02d}.png")
    Image.new("RGB", (20, 30)).save(tmp_path / "val" / "0.png")
    return tmp_path


def data(folder, **options) -> BucketFolderData:
    given = {"buckets": [[8, 16], [16, 8], [12, 12]], "image_size": 12, "batch_size": 2, "num_workers": 0}
    return BucketFolderData(root=str(folder / "train"), val_root=str(folder / "val"), **given | options)


def test_sizes_have_the_area_and_the_step():
    sizes = bucket_sizes(256**2, 32, 2.0)
    assert (256, 256) in sizes
    assert {(width, height) for height, width in sizes} >= {(192, 320), (320, 192)}
    assert all(0.85 * 256**2 < height * width <= 256**2 for height, width in sizes)
    assert all(side % 32 == 0 for size in sizes for side in size)
    assert all(max(size) <= 2 * min(size) for size in sizes)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_has_one_size_of_the_ratio_of_its_pictures(folder, workers):
    batches = list(data(folder, num_workers=workers).train_dataloader())
    assert sorted(key for batch in batches for key in batch["keys"]) == [f"{n:02d}.png" for n in range(18)]
    for batch in batches:
        sizes = {(8, 16) if int(key[:2]) < 8 else (16, 8) if int(key[:2]) < 16 else (12, 12) for key in batch["keys"]}
        assert sizes == {tuple(batch["images"].shape[2:])}


def test_evaluation_has_squares(folder):
    assert next(iter(data(folder).eval_dataloader()))["images"].shape == (1, 3, 12, 12)


def test_order_is_another_each_epoch_and_resumes_with_the_next_batch(folder):
    loader, resumed = (data(folder).train_dataloader() for _ in range(2))
    epochs = [[batch["keys"] for batch in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    resumed.load_state_dict({"epoch": 1, "batch": 3})
    assert [batch["keys"] for batch in resumed] == epochs[1][3:]


def test_ranks_have_the_same_size_at_the_same_time_and_other_pictures():
    parts = [list(BucketBatchSampler([range(9), range(9, 20)], 2, 0, rank, 2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 4
    for one, other in zip(*parts, strict=True):
        assert len({bucket for _, _, bucket in one + other}) == 1
        assert not {index for _, index, _ in one} & {index for _, index, _ in other}


def test_what_fills_no_batch_is_others_each_epoch():
    sampler = BucketBatchSampler([range(5)], 2)
    seen = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        seen.append({index for batch in sampler for _, index, _ in batch})
    assert {len(indices) for indices in seen} == {4}
    assert set.union(*seen) == set(range(5))


def test_size_with_too_few_pictures_gives_them_to_the_nearest():
    shapes = [(10, 10)] * 4 + [(10, 20)] * 4 + [(10, 13)]
    used = assign(shapes, [(8, 8), (8, 10), (8, 16), (32, 8)], smallest=4)
    assert used == [((8, 8), [0, 1, 2, 3, 8]), ((8, 16), [4, 5, 6, 7])]
    with pytest.raises(ValueError, match=r"3 training pictures do not fill one batch of 4: lower data\.batch_size"):
        assign(shapes[:3], [(8, 8)], smallest=4)


@pytest.mark.parametrize("size", [(12, 20), (64, 96), (30, 8)])
def test_picture_is_resized_to_just_cover_its_size(size):
    image = torch.full((3, 40, 60), 7, dtype=torch.uint8)
    result = CoverTransform(size)(image, sample_generator(0, 0, 0))
    assert result.shape == (3, *size)
    assert (result == 7).all()


def test_shape_is_that_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    assert (picture_shape(tmp_path / "a.jpg"), picture_shape(tmp_path / "b.jpg")) == ((30, 20), (1, 1))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_shape_is_read_without_the_pixels(tmp_path, monkeypatch, suffix):
    Image.new("RGB", (30, 20)).save(tmp_path / f"a{suffix}")
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("decoded"))
    assert picture_shape(tmp_path / f"a{suffix}") == (20, 30)


def test_picture_too_elongated_to_cover_a_size_is_a_bad_sample():
    with pytest.raises(BadImageError, match="too large: 40000x1 pixels would become 10240000x256"):
        CoverTransform((256, 256))(torch.zeros(3, 1, 40000, dtype=torch.uint8), sample_generator(0, 0, 0))


def test_unreadable_picture_is_replaced_in_the_size_of_its_batch(folder):
    (folder / "train" / "07.png").write_bytes(b"")
    batches = list(data(folder).train_dataloader())
    assert {bad.key for batch in batches for bad in batch["bad"]} <= {"07.png"}
    assert {len(batch["images"]) for batch in batches} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_scale": [0.5, 1.0]}, r"data\.crop_scale=\[0\.5, 1\.0\] has no effect on buckets"),
        ({"resize_mode": "adm"}, r"data\.resize_mode=adm has no effect on buckets"),
        *(
            ({"buckets": sizes}, r"data\.buckets must be sizes in pixels")
            for sizes in ([[0, 8]], [8, 8], [[8]], [[8.5, 8]])
        ),
        ({"bucket_step": 8}, r"data\.bucket_step and data\.max_ratio have no effect with data\.buckets"),
        ({"buckets": None, "bucket_step": 13}, r"data\.bucket_step must be from 1 to 12 pixels, got 13"),
        ({"buckets": None, "bucket_step": 4, "max_ratio": 0.5}, r"data\.max_ratio must be at least 1, got 0\.5"),
    ],
)
def test_impossible_setting_is_named_as_it_is_typed(folder, monkeypatch, options, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        data(folder, **options)


def test_buckets_in_a_mixture_are_refused(folder):
    part = {"_target_": "vistok.data.BucketFolderData", "weight": 1, "root": str(folder / "train"), "bucket_step": 4}
    with pytest.raises(ValueError, match=r"data\.parts\.a has other sizes than data\.image_size"):
        MixtureData({"a": part}, image_size=12, batch_size=2)
