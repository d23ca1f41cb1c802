"""Loading processes that die or hang, and pictures that are mostly bad: named, and the run goes on or stops."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from vistok.data.bad_samples import BadSample, BadSampleLimit, TooManyBadSamplesError
from vistok.data.loader import DeadWorkerError, TrainLoader, WatchedLoader, leave_signals_to_the_main_process
from vistok.data.sampler import EpochBatchSampler

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers(Dataset):
    """Numbers from 0 to 39; `act` is called with each, and a file that it makes tells later processes."""

    def __init__(self, act=lambda number: None):
        self.act = act

    def __len__(self):
        return 40

    def __getitem__(self, item):
        self.act(item[1])
        return item[1]


def collate(numbers):
    return {
        "images": torch.zeros(len(numbers), 1, 1, 1, dtype=torch.uint8),
        "keys": numbers,
        "bad": [BadSample(f"{n}b", "empty", "0 bytes") for n in numbers if n % 4 == 0],
    }


def loader(dataset, cls=TrainLoader, **options):
    sampler = EpochBatchSampler(40, 4, shuffle=False)
    return cls(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=1, **options)


def die_once(path):
    def act(number):
        if number == 17 and not path.exists():
            path.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def die(number):
    if number == 17:
        time.sleep(0.5)  # what was loaded before reaches the main process
        os.kill(os.getpid(), signal.SIGKILL)


def keys(batches):
    return [key for batch in batches for key in batch["keys"]]


def test_training_goes_on_with_the_next_batch_after_a_worker_died(tmp_path):
    assert keys(loader(Numbers(die_once(tmp_path / "died")), restarts=1)) == list(range(40))
    assert (tmp_path / "died").exists()


def test_training_goes_on_with_persistent_workers_too(tmp_path):
    batches = loader(Numbers(die_once(tmp_path / "died")), restarts=1, persistent_workers=True)
    assert [keys(batches), keys(batches)] == [list(range(40))] * 2


@pytest.mark.parametrize("cls", [TrainLoader, WatchedLoader])
def test_death_of_a_worker_is_named(cls):
    with pytest.raises(DeadWorkerError, match=r"data\.num_workers below 1"):
        list(loader(Numbers(die), cls))


def test_death_of_a_worker_does_not_interrupt_the_main_process():
    batches = iter(loader(Numbers(die), prefetch_factor=8))
    next(batches)
    time.sleep(2)  # the worker dies here, in the middle of what could be an optimiser step
    assert torch.ones(1).item() == 1
    with pytest.raises(DeadWorkerError):
        list(batches)


def test_worker_that_hangs_is_named_and_ended():
    options = {"timeout": 1, "worker_init_fn": leave_signals_to_the_main_process}
    before = set(multiprocessing.active_children())  # of loaders of other tests that are still alive
    with pytest.raises(DeadWorkerError, match="timed out after 1 seconds"):
        list(loader(Numbers(lambda number: time.sleep(60 if number == 6 else 0)), **options))
    deadline = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not set(multiprocessing.active_children()) - before


def test_program_ends_though_its_loader_is_alive(tmp_path):
    (tmp_path / "root").mkdir()
    for number in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "root" / f"{number}.png")
    program = (
        "import sys; from vistok.data import ImageFolderData\n"
        "data = ImageFolderData(sys.argv[1], image_size=8, batch_size=1, num_workers=1)\n"
        "batches = iter(data.train_dataloader()); print(len(next(batches)['keys']), flush=True)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "root")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, "1\n"), result.stderr


@pytest.mark.parametrize("kind", [RuntimeError, FileNotFoundError])
def test_error_of_a_data_set_stays_what_it_is(kind):
    def fail(number):
        raise kind("something else")

    with pytest.raises(kind, match="something else"):
        list(loader(Numbers(fail)))


def test_too_many_bad_samples_stop_the_pass(monkeypatch):
    monkeypatch.setattr("vistok.data.loader.BadSampleLimit", partial(BadSampleLimit, minimum=20))
    assert len(list(loader(Numbers(), max_bad_share=0.3))) == 10
    with pytest.raises(TooManyBadSamplesError, match="4 empty"):
        list(loader(Numbers(), max_bad_share=0.1))
