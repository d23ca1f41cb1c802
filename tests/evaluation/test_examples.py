"""What is kept of a stream: the highest ranks, and a sample that does not depend on the order of the images."""

import pytest
import torch
from patch_tokenizer import PROTOCOL, make_batches, make_tokenizer

from vistok.evaluation import evaluate
from vistok.evaluation.examples import Highest, draw
from vistok.evaluation.references import JPEG
from vistok.metric import psnr


def run(batches, **options):
    return evaluate(make_tokenizer(), batches, protocol=PROTOCOL, lpips=None, rfid=False, **options)


def test_the_highest_ranks_are_kept_and_ties_go_to_the_earlier():
    highest = Highest[str](3)
    for rank, name in ((1, "a"), (3, "b"), (2, "c"), (3, "d"), (2, "e"), (0, "f")):
        highest.offer(rank, lambda name=name: name)
    assert highest.ranked() == {1: "b", 3: "d", 2: "c"}


def test_what_is_not_kept_is_not_made():
    highest = Highest[int](1)
    highest.offer(1, lambda: 1)
    highest.offer(0, pytest.fail)
    assert Highest[int](0).offer(1, pytest.fail) is None
    assert highest.ranked() == {0: 1}


def test_draws_look_uniform():
    values = sorted(draw(f"{number}.png") for number in range(1000))
    assert max(abs(value - number / 1000) for number, value in enumerate(values)) < 0.06


def test_random_examples_do_not_depend_on_the_order_of_the_images():
    batches = make_batches(5, 5, 3)
    keys = [example.key for example in run(batches, examples=4).random]
    assert [example.key for example in run(batches[::-1], examples=4).random] == keys
    assert len(set(keys)) == 4


def test_references_of_a_large_set_are_those_of_a_sample_and_say_so(monkeypatch):
    monkeypatch.setattr("vistok.evaluation.measures.REFERENCE_IMAGES", 4)
    batches = make_batches(5, 5, 3)
    keys = sorted((key for batch in batches for key in batch["keys"]), key=draw)[-4:]
    images = torch.stack(
        [image for batch in batches for key, image in zip(batch["keys"], batch["images"], strict=True) if key in keys]
    )
    jpeg = run(batches).references[-1]
    images = images.mul(127.5).add(127.5).round().sub(127.5).div(127.5)
    assert jpeg.psnr == pytest.approx(psnr(JPEG()(images)[0], images).mean().item(), rel=1e-5)
    assert jpeg.images == 4


def test_references_of_a_small_set_are_those_of_all_images():
    assert {reference.images for reference in run(make_batches(3)).references} == {None}
