"""Several data sets as one."""

import jaxtyping
import pytest
import torch
from hydra.utils import instantiate
from lightning import Trainer
from omegaconf import OmegaConf
from PIL import Image

from vistok.data.mixture import MixtureData, shares

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def parts(tmp_path) -> dict:
    """Two folders: 6 black pictures and 10 white ones, with another one each for validation."""
    for name, count in (("black", 6), ("white", 10)):
        for number in range(count + 1):
            path = tmp_path / name / ("val" if number == count else "train") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 10), name).save(path)
    return {
        name: {
            "_target_": "vistok.data.ImageFolderData",
            "root": str(tmp_path / name / "train"),
            "val_root": str(tmp_path / name / "val"),
            "weight": weight,
        }
        for name, weight in (("black", 1), ("white", 3))
    }


def mixture(parts, **options) -> MixtureData:
    return MixtureData(parts, **{"image_size": 8, "batch_size": 4, "num_workers": 0} | options)


def keys(loader) -> list[list[str]]:
    return [batch["keys"] for batch in loader]


def test_every_batch_has_the_parts_in_proportion_to_their_weights(parts):
    batches = list(mixture(parts).train_dataloader())
    assert len(batches) == (6 + 9) // 4
    for batch in batches:
        assert [key.split(":")[0] for key in batch["keys"]] == ["black", "white", "white", "white"]
        assert batch["images"].mean((1, 2, 3)).tolist() == [-1, 1, 1, 1]
        assert "labels" not in batch


def test_short_part_is_repeated_in_new_orders_and_none_is_favoured(parts):
    seen = [key for batch in keys(mixture(parts, samples_per_epoch=72).train_dataloader()) for key in batch]
    black, white = (seen[0::4], [key for n, key in enumerate(seen) if n % 4])
    assert [sorted(black[n : n + 6]) for n in (0, 6, 12)] == [[f"black:{n}.png" for n in range(6)]] * 3
    assert black[:6] != black[6:12]
    assert len(set(white)) == 10


def test_position_of_every_batch_can_be_taken_up(parts):
    whole = [keys(loader) for loader in [mixture(parts).train_dataloader()] for _ in range(4)]
    for epoch in range(4):
        for batch in range(3):
            loader = mixture(parts).train_dataloader()
            loader.load_state_dict({"epoch": epoch, "batch": batch})
            assert keys(loader) == whole[epoch][batch:]


def test_ranks_have_disjoint_pictures(parts):
    seen = []
    for rank in range(2):
        data = mixture(parts)
        one_of_two = type("OneOfTwo", (Trainer,), {"global_rank": rank, "world_size": 2})
        data.trainer = one_of_two(accelerator="cpu", logger=False, use_distributed_sampler=False)
        seen.append({key for batch in keys(data.make_train_loader(None, rank, 2)) for key in batch})
    assert seen[0]
    assert not seen[0] & seen[1]


def test_evaluation_has_the_pictures_of_all_parts(parts):
    data = mixture(parts)
    assert keys(data.eval_dataloader()) == [["black:6.png"], ["white:10.png"]]
    assert data.protocol["num_images"] == 2
    assert data.protocol["size"] == [8, 8]


def test_workers_of_the_parts_do_not_change_the_pictures(parts):
    for one, other in zip(*(mixture(parts, num_workers=n).train_dataloader() for n in (0, 1)), strict=True):
        assert one["keys"] == other["keys"]
        assert torch.equal(one["images"], other["images"])


def test_config_builds_a_mixture_of_parts(parts):
    config = OmegaConf.merge(OmegaConf.load("configs/data/mixture.yaml"), {"parts": parts, "batch_size": 4})
    data = instantiate(config, image_size=8, num_workers=0, _convert_="all")
    assert len(keys(data.train_dataloader())) == 3


@pytest.mark.parametrize(
    ("weights", "expected"), [([1, 1], [4, 4]), ([0.7, 0.3], [6, 2]), ([1, 1, 1], [3, 3, 2]), ([98, 1, 1], None)]
)
def test_shares_sum_to_the_batch_and_none_is_empty(weights, expected):
    if expected is None:
        with pytest.raises(ValueError, match="set it to at least 100"):
            shares(8, weights)
    else:
        assert shares(8, weights) == expected


def test_impossible_parts_are_named(parts, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"data\.parts\.black has no weight"):
        mixture({"black": {"_target_": "vistok.data.ImageFolderData"}})
    with pytest.raises(ValueError, match=r"data\.parts\.black\.channels has no effect"):
        mixture({**parts, "black": {**parts["black"], "channels": 1}})
    with pytest.raises(ValueError, match="positive weights"):
        mixture({**parts, "black": {**parts["black"], "weight": 0}})
    with pytest.raises(ValueError, match=r"positive weights, got \['much', 3\]"):
        mixture({**parts, "black": {**parts["black"], "weight": "much"}})
    for wrong in (None, ["a"], {"black": None}):
        with pytest.raises(ValueError, match=r"data\.parts are \{name: \{_target_: "):
            mixture(wrong)
