"""Training that was interrupted goes on with exactly the next batch."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import webdataset as wds
from lightning import Callback, LightningModule, Trainer
from PIL import Image

from vistok.data import DataModule, ImageFolderData, WebDatasetData

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning's use of torch's pytree
]


class Recorder(LightningModule):
    """Learns nothing; remembers the keys it was given."""

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
        self.fail_at = fail_at

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise InterruptedError
        self.seen.append((*batch["keys"], batch["images"].sum().item()))
        return self.weight * batch["images"].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Saver(Callback):
    """Writes a checkpoint wherever Lightning's own callbacks may write one."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.points = {}

    def save(self, trainer, module, hook):
        if not trainer.sanity_checking:
            path = self.folder / f"{len(self.points)}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            self.points[path] = (hook, len(module.seen))

    def on_train_batch_end(self, trainer, module, *_):
        self.save(trainer, module, "batch")

    def on_validation_end(self, trainer, module):
        self.save(trainer, module, "validation")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, module, "epoch")

    def on_exception(self, trainer, module, exception):
        self.save(trainer, module, "exception")


def fit(data: DataModule, module: Recorder, saver: Saver | None = None, checkpoint: Path | None = None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 2, "num_sanity_val_steps": 0} | options
    trainer = Trainer(
        accelerator="cpu", callbacks=[saver] if saver else [], enable_checkpointing=False, **quiet, **options
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module.seen


@pytest.fixture
def pictures(tmp_path) -> Callable[..., ImageFolderData]:
    """Makes data of 7 training pictures, 3 batches an epoch, and one picture for validation."""
    for number in range(8):
        path = tmp_path / ("val" if number == 7 else "root") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((20, 16)).rotate(10 * number).save(path)
    roots = {"root": str(tmp_path / "root"), "val_root": str(tmp_path / "val")}
    return lambda num_workers=0: ImageFolderData(**roots, image_size=8, batch_size=2, num_workers=num_workers)


def assert_resumes(make_data, folder: Path, chosen=None, **options) -> None:
    saver = Saver(folder)
    whole = fit(make_data(), Recorder(), saver, **options)
    assert len(set(whole)) == len(whole) > 3
    for number, (path, (hook, done)) in enumerate(saver.points.items()):
        if chosen is None or number in chosen:
            rest = fit(make_data(), Recorder(), checkpoint=path, **options)
            assert rest == whole[done:], f"resumed after {done} batches from a checkpoint of {hook} end"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "val_check_interval": 2, "num_sanity_val_steps": 1},
        {"limit_train_batches": 2},
        {"max_epochs": -1, "max_steps": 5, "limit_val_batches": 0},
        {
            "max_epochs": -1,
            "max_steps": 4,
            "accumulate_grad_batches": 2,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
        },
    ],
    ids=["plain", "accumulation and validation inside", "limited", "by steps without validation", "by steps"],
)
def test_resumed_run_equals_the_uninterrupted_one_at_every_checkpoint(pictures, tmp_path, options):
    assert_resumes(pictures, tmp_path, **options)


def test_resumed_run_with_workers_equals_the_uninterrupted_one(pictures, tmp_path):
    # Points 0, 2 and 4 are after a batch, after validation in the middle, and at the end of the epoch.
    options = {"val_check_interval": 2, "accumulate_grad_batches": 2}
    assert_resumes(partial(pictures, 2), tmp_path, chosen={0, 2, 4}, **options)


def test_number_of_workers_may_change_on_resume(pictures, tmp_path):
    saver = Saver(tmp_path)
    whole = fit(pictures(), Recorder(), saver)
    path, (_, done) = list(saver.points.items())[1]
    assert fit(pictures(2), Recorder(), checkpoint=path) == whole[done:]


def test_resuming_inside_an_epoch_of_other_pictures_is_told(pictures, tmp_path, caplog):
    state = pictures().train_dataloader().state_dict()
    Image.new("RGB", (8, 8)).save(tmp_path / "root" / "9.png")
    grown = pictures().train_dataloader()
    grown.load_state_dict(state)
    assert not caplog.text
    grown.load_state_dict(state | {"batch": 1})
    assert "inside an epoch with num_samples 7, this run has 8" in caplog.text


def test_batch_of_an_interrupted_step_is_not_lost(pictures, tmp_path):
    whole = fit(pictures(), Recorder())
    saver = Saver(tmp_path)
    with pytest.raises(InterruptedError):
        fit(pictures(), Recorder(fail_at=4), saver)
    path, point = list(saver.points.items())[-1]
    assert point == ("exception", 4)
    assert fit(pictures(), Recorder(), checkpoint=path) == whole[4:]


def test_run_resumed_twice_equals_the_uninterrupted_one(pictures, tmp_path):
    first, second = Saver(tmp_path / "1"), Saver(tmp_path / "2")
    whole = fit(pictures(), Recorder(), first)
    path, (_, done) = next(iter(first.points.items()))
    rest = fit(pictures(), Recorder(), second, path)
    path, (_, done_again) = next(iter(second.points.items()))
    assert (done, done_again) == (1, 1)
    assert fit(pictures(), Recorder(), checkpoint=path) == rest[1:] == whole[2:]


def test_same_data_module_starts_anew_with_a_new_trainer(pictures):
    data = pictures()
    assert fit(data, Recorder()) == fit(data, Recorder())


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_resume_too(tmp_path, caplog, workers):
    for number in range(2):
        with wds.TarWriter(str(tmp_path / f"{number}.tar")) as writer:
            for n in range(12 * number, 12 * number + 12):
                file = io.BytesIO()
                Image.linear_gradient("L").resize((20, 16)).rotate(n).save(file, "PNG")
                writer.write({"__key__": f"{n}", "png": file.getvalue()})
    options = {"samples_per_epoch": 24, "image_size": 8, "batch_size": 4, "num_workers": workers}
    make_data = partial(WebDatasetData, f"{tmp_path}/0.tar", f"{tmp_path}/1.tar", **options)
    assert_resumes(make_data, tmp_path, chosen={2, 6} if workers == 0 else {2})
    loader = make_data(num_workers=1).train_dataloader()
    loader.load_state_dict(make_data().train_dataloader().state_dict() | {"batch": 1})
    assert f"with num_workers {workers}, this run has 1" in caplog.text
