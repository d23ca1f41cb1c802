"""One pass over the images: numbers, reasons and refusals."""

import math
import os

import pytest
import torch
from patch_tokenizer import PROTOCOL, Levels, Repeat, make_batches, make_tokenizer

from vistok.evaluation import Protocol, evaluate
from vistok.evaluation.evaluate import CODEBOOK_METRICS
from vistok.metric import CodebookUsage, l1, psnr, ssim
from vistok.metric.distances import INCEPTION_DISTANCES
from vistok.quantizer.base import Quantized

MORE = {"distances": ["kid", "sfid"], "fdd": "test_vit", "cmmd": "test_vit"}


def run(tokenizer, batches, **options):
    defaults = {"protocol": PROTOCOL, "lpips": None, "rfid": False}
    return evaluate(tokenizer, batches, **(defaults | options))


def joined(batches):
    return torch.cat([batch["images"] for batch in batches])


def test_image_metrics_are_means_over_all_images(tokenizer, batches):
    images = joined(batches)
    ours = tokenizer(images).images
    metrics = run(tokenizer, batches).metrics
    for name, measure in (("psnr", psnr), ("ssim", ssim), ("l1", l1)):
        assert metrics[name] == pytest.approx(measure(ours, images).mean().item(), rel=1e-5)


def test_codebook_metrics_count_every_index(tokenizer, batches):
    usage = CodebookUsage((8,))
    usage.update(tokenizer.encode(joined(batches)).indices)
    metrics = run(tokenizer, batches).metrics
    for name in ("utilisation", "perplexity", "entropy_bits", "dead_codes", "tokens", "expected_uniform_utilisation"):
        assert metrics[name] == usage.compute()[name].item()


def test_several_codebooks_are_listed_each(batches):
    evaluation = run(make_tokenizer("separate"), batches)
    assert evaluation.codebook_sizes == (2, 2, 2)
    assert len(evaluation.usage) == 3
    assert evaluation.per_codebook["tokens"] == [13 * 8 * 12] * 3


class Binary(Levels):
    bit_order = "lsb_first"


class TwoScales(Levels):
    """The level of every position after that of the first one."""

    def scale_lengths(self, grid):
        return (1, math.prod(grid))

    def forward(self, features, labels=None):
        codes, indices, losses = super().forward(features)
        indices = indices.flatten(1)
        return Quantized(codes, torch.cat([indices[:, :1], indices], 1), losses)


class Labelled(Levels):
    """The index of every position is the label."""

    accepts_labels = True

    def forward(self, features, labels=None):
        codes, indices, losses = super().forward(features)
        label = 0 if labels is None else labels[:, None, None]
        return Quantized(codes, torch.zeros_like(indices) + label, losses)


def with_quantizer(quantizer):
    tokenizer = make_tokenizer()
    tokenizer.quantizer = quantizer
    return tokenizer


def test_each_bit_of_binary_codes_is_listed(batches):
    tokenizer = with_quantizer(Binary())
    evaluation = run(tokenizer, batches)
    ones = (tokenizer.encoder(joined(batches)) >= 0).double().mean((0, 2, 3))
    assert evaluation.per_bit["ones"] == pytest.approx(ones.tolist())
    assert evaluation.per_bit.keys() == {"ones", "entropy_bits"}
    assert evaluation.metrics["dead_bits"] == 0
    assert evaluation.per_scale == {}


def test_each_scale_is_listed(batches):
    evaluation = run(with_quantizer(TwoScales()), batches)
    assert evaluation.per_scale["tokens"] == [13, 13 * 96]
    assert evaluation.per_scale.keys() == {name for name in CODEBOOK_METRICS}
    assert evaluation.per_bit == {}
    assert evaluation.per_codebook == {}
    assert "dead_bits" not in evaluation.metrics


def test_labels_of_a_batch_reach_a_quantizer_that_accepts_them(batches):
    for label, batch in zip((2, 5, 5), batches, strict=True):
        batch["labels"] = torch.full((len(batch["images"]),), label)
    usage = run(with_quantizer(Labelled()), batches).usage[0]
    assert usage.nonzero().flatten().tolist() == [2, 5]


def test_the_rate_is_that_of_the_tokenizer(tokenizer, batches):
    assert run(tokenizer, batches).metrics["bits_per_pixel"] == 3 / 16


def test_the_coded_rate_counts_what_an_adaptive_coder_spends(tokenizer, batches):
    usage = CodebookUsage((8,))
    usage.update(tokenizer.encode(joined(batches)).indices)
    metrics = run(tokenizer, batches).metrics
    assert metrics["coded_bits_per_pixel"] == pytest.approx(usage.coded_bits() / (13 * 32 * 48))
    assert metrics["coded_bits_per_pixel"] > metrics["entropy_bits"] / 16


def test_peak_memory_is_positive(tokenizer, batches):
    assert run(tokenizer, batches).metrics["peak_memory_mib"] > 1


def test_speeds_are_positive(tokenizer, batches):
    metrics = run(tokenizer, batches).metrics
    assert metrics["encode_images_per_second"] > 0
    assert metrics["decode_images_per_second"] > 0


def test_the_first_batch_runs_once_more_to_warm_up(tokenizer, batches):
    run(tokenizer, batches)
    assert tokenizer.decoder.calls == len(batches) + 1


def test_worst_and_best_are_ranked_and_named(tokenizer, batches):
    evaluation = run(tokenizer, batches, examples=3)
    table = sorted(zip(evaluation.per_image["psnr"], evaluation.per_image["key"], strict=True))
    assert [example.key for example in evaluation.worst] == [key for _, key in table[:3]]
    assert [example.key for example in evaluation.best] == [key for _, key in table[:-4:-1]]


def test_examples_hold_the_images_of_their_key(tokenizer, batches):
    example = run(tokenizer, batches).worst[0]
    letter, number = example.key
    image = batches["abc".index(letter)]["images"][int(number)][None]
    assert torch.equal(example.original, image.mul(127.5).add(127.5).round().to(torch.uint8)[0])
    assert psnr(example.reconstruction[None] / 127.5 - 1, image).item() == pytest.approx(example.psnr)


def test_few_images_are_not_shown_twice(tokenizer):
    evaluation = run(tokenizer, make_batches(5), examples=3)
    keys = [example.key for example in evaluation.worst + evaluation.best]
    assert len(keys) == len(set(keys)) == 5


def test_images_without_keys_are_numbered(tokenizer, batches):
    nameless = [{"images": batch["images"]} for batch in batches]
    assert run(tokenizer, nameless).per_image["key"] == [str(number) for number in range(13)]


def test_unreadable_samples_are_counted(tokenizer, batches):
    batches[1]["bad"] = ["x.jpg", "y.jpg"]
    assert run(tokenizer, batches).bad == 2


def test_an_empty_batch_is_passed_over(tokenizer, batches):
    empty = {"images": torch.empty(0, 3, 32, 48), "keys": [], "bad": ["x.jpg"]}
    evaluation = run(tokenizer, [empty, *batches])
    assert evaluation.protocol["images"] == 13
    assert evaluation.bad == 1


def test_the_protocol_says_what_was_given_and_what_was_done(tokenizer, batches):
    protocol = run(tokenizer, batches).protocol
    assert {name: protocol[name] for name in PROTOCOL} == PROTOCOL
    assert protocol["images"] == 13
    assert protocol["size"] == [32, 48]
    assert protocol["precision"] == "tokenizer float32; metrics float32"
    assert {"rounding", "ssim", "codebook", "versions", "device"} <= set(protocol)


def test_the_protocol_names_the_autocast(tokenizer, batches):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "bfloat16 autocast" in run(tokenizer, batches).protocol["precision"]


def test_references_are_the_same_under_autocast(tokenizer, batches):
    outside = run(tokenizer, batches).references
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(tokenizer, batches).references == outside


def test_a_protocol_that_leaves_something_out_is_refused(tokenizer, batches):
    with pytest.raises(ValueError, match=r"lacks \['resize', 'crop'\]"):
        run(tokenizer, batches, protocol={"dataset": "x", "split": "val"})


def test_training_usage_stands_beside_the_held_out_one(tokenizer, batches):
    metrics = run(tokenizer, batches, train_usage={"utilisation": 0.25}).metrics
    assert metrics["train_utilisation"] == 0.25


def test_references_are_measured_on_the_same_images(tokenizer, batches):
    names = [reference.name for reference in run(tokenizer, batches).references]
    assert names == ["same-rate patch colour, 2x2x2 levels", "bicubic 8x12, 8 bits per channel", "JPEG, quality 1"]


def test_references_can_be_left_out(tokenizer, batches):
    assert run(tokenizer, batches, references=False).references == []


def test_evaluation_does_not_train(tokenizer, batches):
    tokenizer.train()
    tokenizer.encoder.eval()
    run(tokenizer, batches)
    assert tokenizer.training
    assert tokenizer.decoder.training
    assert not tokenizer.encoder.training


@pytest.mark.parametrize("metric", ["lpips", "rfid", "kid", "sfid", "fdd", "cmmd"])
def test_missing_weights_leave_the_metric_out_with_the_reason(metric, tokenizer, batches, tmp_path):
    evaluation = run(tokenizer, batches, weights=tmp_path, lpips="vgg", rfid=True, **MORE)
    assert metric not in evaluation.metrics
    assert "VISTOK_WEIGHTS" in evaluation.missing[metric]


def test_small_images_leave_metrics_out_with_the_reason(tokenizer):
    evaluation = run(tokenizer, make_batches(2, size=(4, 8)))
    assert "at least 6 pixels, images have 4x8" in evaluation.missing["ssim"]
    assert "at least 176 pixels" in evaluation.missing["ms_ssim"]
    assert "psnr" in evaluation.metrics


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_measured(channels, tmp_path):
    options = {"lpips": "vgg", "rfid": True, "weights": tmp_path}
    evaluation = run(make_tokenizer(channels=channels), make_batches(3, channels=channels), **options)
    assert evaluation.metrics["psnr"] > 0
    assert ("needs 1 or 3 channels" in evaluation.missing["lpips"]) == (channels == 4)


def test_continuous_tokenizers_have_no_codebook_metrics_and_no_rate(batches):
    evaluation = run(make_tokenizer("continuous"), batches)
    assert {"utilisation", "perplexity", "bits_per_pixel", "reference same-rate patch colour"} <= set(
        evaluation.missing
    )
    assert all(math.isfinite(value) for value in evaluation.metrics.values())


def test_decoders_of_features_are_measured_by_their_codes_only(batches):
    decoder = Repeat()
    decoder.output = "features"
    evaluation = run(make_tokenizer(decoder=decoder), batches)
    assert "features of a teacher" in evaluation.missing["psnr"]
    assert evaluation.metrics["utilisation"] > 0
    assert evaluation.worst == []


def test_no_images_are_refused(tokenizer):
    with pytest.raises(ValueError, match="no image or video to evaluate"):
        run(tokenizer, [])


def test_a_size_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"do not fit this tokenizer \(.*multiple of 4"):
        run(tokenizer, make_batches(2, size=(30, 32)))


def test_a_change_of_size_is_refused(tokenizer):
    with pytest.raises(ValueError, match="one shape"):
        run(tokenizer, make_batches(2) + make_batches(2, size=(48, 32)))


@pytest.mark.parametrize("wrong", [255.0, math.nan])
def test_images_outside_the_range_are_refused(wrong, tokenizer, batches):
    batches[0]["images"][0, 0, 0, 0] = wrong
    with pytest.raises(ValueError, match=r"must be in \[-1, 1\]"):
        run(tokenizer, batches)


def test_settings_without_effect_or_sense_are_refused(tokenizer, batches):
    with pytest.raises(ValueError, match="examples must not be negative"):
        run(tokenizer, batches, examples=-1)
    with pytest.raises(ValueError, match=r"reference=adm.npz has no effect without rFID"):
        run(tokenizer, batches, rules=Protocol(reference="adm.npz"))


def test_keys_of_another_number_are_refused(tokenizer, batches):
    batches[0]["keys"].pop()
    with pytest.raises(ValueError, match="5 images but 4 keys"):
        run(tokenizer, batches)


def test_a_reconstruction_of_another_shape_is_refused(batches):
    class Cropping(Repeat):
        def forward(self, features, codes=None, size=None):
            return super().forward(features)[..., :-1]

    with pytest.raises(ValueError, match=r"gave \(5, 3, 32, 47\) for images \(5, 3, 32, 48\)"):
        run(make_tokenizer(decoder=Cropping()), batches)


def test_a_reconstruction_that_is_not_finite_is_refused_by_its_key(batches):
    class Broken(Repeat):
        def forward(self, features, codes=None, size=None):
            images = super().forward(features)
            images[2, 0, 0, 0] = math.nan
            return images

    with pytest.raises(ValueError, match="'a2' holds NaN"):
        run(make_tokenizer(decoder=Broken()), batches)


@pytest.mark.skipif("VISTOK_WEIGHTS" not in os.environ, reason="VISTOK_WEIGHTS")
def test_real_networks_are_measured_and_named(tokenizer):
    evaluation = run(tokenizer, make_batches(2), lpips="alex")
    assert 0 < evaluation.metrics["lpips"] < 2
    assert evaluation.protocol["lpips"]["network"] == "LPIPS v0.1, alex"


@pytest.mark.skipif("VISTOK_WEIGHTS" not in os.environ, reason="VISTOK_WEIGHTS")
def test_one_pass_of_inception_measures_everything(tokenizer):
    names = ["sfid", "kid", "precision_recall", "inception_score"]
    evaluation = run(tokenizer, make_batches(5), rfid=True, distances=names)
    assert {"rfid", "sfid", "kid", "precision", "recall"} <= set(evaluation.metrics)
    # The weights at hand were converted without the classifier.
    assert ("inception_score" in evaluation.metrics) != ("inception_score" in evaluation.missing)
    assert len(evaluation.protocol["rfid"]["sha256"]) == 64
    assert set(evaluation.notes) == {"rfid", "sfid", "kid"}


@pytest.mark.parametrize(("rfid", "distances", "asked_for"), [(True, None, 5), (False, None, 0), (False, ["kid"], 1)])
def test_the_default_distances_are_those_beside_rfid(rfid, distances, asked_for, tokenizer, tmp_path):
    evaluation = run(tokenizer, make_batches(5), rfid=rfid, distances=distances, weights=tmp_path)
    reasons = [evaluation.missing[name] for name in INCEPTION_DISTANCES]
    assert sum("inception-2015-12-05.pth" in reason for reason in reasons) == asked_for
    assert reasons.count("switched off") == 5 - asked_for
