"""Every layout of indices: several codebooks, several scales, shortened codes, labels, and none at all."""

import itertools
import math

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import vistok
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import FSQ, LFQ, Quantized, Quantizer
from vistok.quantizer.continuous import Identity

FACTOR = 8


class Digits(Quantizer):
    """Rounds to `depth` digits of `base`, coarse to fine; the mean over the map is the first of two scales if asked."""

    def __init__(self, depth=3, base=4, scales=False):
        super().__init__()
        self.dim, self.depth, self.base, self.scales = 2, depth, base, scales
        self.codebook_sizes = tuple(base**2 + stage for stage in range(depth))
        self.bits, self.loss_weights = depth * 2 * math.log2(base), {}

    def scale_lengths(self, grid):
        return (1, math.prod(grid)) if self.scales else ()

    def indices_shape(self, grid):
        positions = (1 + math.prod(grid),) if self.scales else tuple(grid)
        return (*positions, self.depth) if self.depth > 1 else positions

    def total_bits(self, grid):
        return self.bits * math.prod(self.indices_shape(grid)) / self.depth

    def shorten(self, indices, length, grid=None):
        return indices[:, : sum(self.scale_lengths(grid)[:length])] if self.scales else indices[..., :length]

    def forward(self, features, labels=None):
        rows = features.movedim(1, -1)
        if self.scales:
            rows = torch.cat([rows.flatten(1, -2).mean(1, keepdim=True), rows.flatten(1, -2)], 1)
        unit, digits = rows.sigmoid().clamp(max=1 - 1e-6), []
        for _ in range(self.depth):
            digit = (unit * self.base).floor()
            unit = unit * self.base - digit
            digits.append((digit[..., 0] * self.base + digit[..., 1]).long())
        indices = torch.stack(digits, -1) if self.depth > 1 else digits[0]
        return Quantized(self.indices_to_codes(indices, features.shape[2:]).to(features.dtype), indices, {})

    def indices_to_codes(self, indices, grid=None):
        columns = indices if self.depth > 1 else indices.unsqueeze(-1)
        pairs = torch.stack([columns // self.base, columns % self.base], -1).float()
        weights = self.base ** -torch.arange(1.0, columns.shape[-1] + 1)
        codes = (pairs * weights.unsqueeze(-1)).sum(-2)
        if self.scales:
            whole = codes[:, :1].expand(-1, math.prod(grid), -1) * 0.5
            codes = (whole + codes[:, 1:] if codes.shape[1] > 1 else whole).unflatten(1, tuple(grid))
        return codes.movedim(-1, 1)

    def codes_to_indices(self, codes):
        raise NotImplementedError


LAYOUTS = {
    "one codebook": {"depth": 1},
    "several codebooks": {"depth": 3},
    "scales": {"depth": 1, "scales": True},
    "scales of several codebooks": {"depth": 3, "scales": True},
}


def make(quantizer, size=(16, 24)):
    encoder = CNNEncoder(base_channels=32, num_blocks=1)
    decoder = CNNDecoder(base_channels=32, num_blocks=1)
    return vistok.Tokenizer(encoder, quantizer, decoder, preprocessing={"size": list(size)}).eval()


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def tokenizer(request):
    return make(Digits(**request.param))


def images(height=16, width=24, batch=2):
    return torch.rand(batch, 3, height, width) * 2 - 1


def lengths_of(tokenizer):
    """The numbers of parts that codes may be cut to."""
    if tokenizer.quantizer.scales:
        return (1, 2)
    return range(1, tokenizer.quantizer.depth + 1)


def test_every_layout_decodes_to_the_images_of_its_codes(tokenizer):
    quantized = tokenizer.encode(images())
    assert quantized.indices.shape[1:] == tokenizer.quantizer.indices_shape((2, 3))
    assert torch.equal(tokenizer.indices_to_codes(quantized.indices), quantized.codes)
    assert torch.equal(tokenizer.decode_indices(quantized.indices), tokenizer.decode(quantized.codes))


def test_an_image_of_another_size_is_decoded_by_its_size(tokenizer):
    quantized = tokenizer.encode(images(32, 8))
    assert torch.equal(tokenizer.decode_indices(quantized.indices, (32, 8)), tokenizer.decode(quantized.codes, (32, 8)))


@pytest.mark.parametrize("size", [(16, 24), (32, 8)])
@pytest.mark.parametrize("offsets", [False, True])
def test_flatten_and_unflatten_are_inverse_for_codes_of_every_length(tokenizer, size, offsets):
    fixed = tokenizer.quantizer.depth == 1 and not tokenizer.quantizer.scales
    for length in (None, *(lengths_of(tokenizer) if not fixed else ())):
        indices = tokenizer.encode(images(*size), length=length).indices
        ids = tokenizer.flatten(indices, offsets=offsets)
        assert ids.shape == (2, indices[0].numel())
        assert torch.equal(tokenizer.unflatten(ids, size, offsets=offsets), indices)


def test_sequences_run_scale_by_scale_in_raster_order_with_depth_fastest():
    tokenizer = make(Digits(depth=3, scales=True))
    indices = tokenizer.encode(images()).indices
    expected = [indices[1, token, depth].item() for token, depth in itertools.product(range(7), range(3))]
    assert tokenizer.flatten(indices)[1].tolist() == expected


def test_offsets_give_each_codebook_its_own_ids():
    tokenizer = make(Digits(depth=3))
    indices = tokenizer.encode(images()).indices
    ids = tokenizer.flatten(indices, offsets=True).unflatten(1, (2, 3, 3))
    for depth, (start, size) in enumerate(zip((0, 16, 33), (16, 17, 18), strict=True)):
        assert torch.equal(ids[..., depth], indices[..., depth] + start)
        assert ids[..., depth].max() < start + size


def test_the_length_of_a_sequence_is_that_of_its_ids(tokenizer):
    for size in ((16, 24), (32, 8)):
        ids = tokenizer.flatten(tokenizer.encode(images(*size)).indices)
        assert tokenizer.sequence_length(size) == ids.shape[1]


def test_the_rate_counts_the_tokens_of_all_scales():
    assert make(Digits(depth=1)).bits_per_pixel() == pytest.approx(6 * 4 / 384)
    assert make(Digits(depth=1, scales=True)).bits_per_pixel() == pytest.approx(7 * 4 / 384)
    assert make(Digits(depth=3, scales=True)).bits_per_pixel((32, 8)) == pytest.approx(5 * 12 / 256)


@pytest.mark.parametrize("kind", ["several codebooks", "scales", "scales of several codebooks"])
def test_a_shortened_code_is_the_beginning_of_the_whole_one(kind):
    tokenizer = make(Digits(**LAYOUTS[kind]))
    batch = images()
    whole = tokenizer.encode(batch)
    errors = []
    for length in lengths_of(tokenizer):
        quantized = tokenizer.encode(batch, length=length)
        cut = (slice(None), slice((1, 7)[length - 1])) if tokenizer.quantizer.scales else (..., slice(length))
        assert torch.equal(quantized.indices, whole.indices[cut])
        assert torch.equal(tokenizer.decode_indices(quantized.indices), tokenizer.decode(quantized.codes))
        errors.append((quantized.codes - whole.codes).square().mean().item())
    assert errors[-1] == 0
    assert errors == sorted(errors, reverse=True)


def test_codes_are_shortened_in_evaluation_only():
    tokenizer = make(Digits()).train()
    with pytest.raises(ValueError, match=r"length=2 is for evaluation: call tokenizer.eval\(\) first"):
        tokenizer.encode(images(), length=2)


def test_shortened_codes_keep_the_dtype_of_the_features():
    tokenizer = make(Digits()).bfloat16()
    assert tokenizer.encode(images().bfloat16(), length=2).codes.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layout", "lengths"),
    [("several codebooks", "6 or 12 or 18"), ("scales", "1 or 7"), ("scales of several codebooks", "3 or 21")],
)
def test_a_sequence_that_ends_inside_a_part_is_an_error(layout, lengths):
    tokenizer = make(Digits(**LAYOUTS[layout]))
    with pytest.raises(ValueError, match=rf"ids must be \(b, {lengths}\) .* got \(2, 5\): pass the size"):
        tokenizer.unflatten(torch.zeros(2, 5, dtype=torch.int64))


def test_the_bits_of_a_binary_quantizer_are_a_sequence():
    tokenizer = make(LFQ(bits=6, index_bits=1))
    quantized = tokenizer.encode(images())
    assert quantized.indices.shape == (2, 2, 3, 6)
    assert tokenizer.vocab_size == 2
    assert tokenizer.sequence_length() == 36
    ids = tokenizer.flatten(quantized.indices)
    assert torch.equal(tokenizer.decode_indices(tokenizer.unflatten(ids)), tokenizer.decode(quantized.codes))


def test_continuous_codes_have_no_integers():
    tokenizer = make(Identity(2))
    quantized = tokenizer.encode(images())
    assert quantized.indices.shape == (2, 2, 3, 0)
    assert tokenizer.decode(quantized.codes).shape == (2, 3, 16, 24)
    assert tokenizer.bits_per_pixel() == math.inf
    ids = torch.zeros(2, 6, dtype=torch.int64)
    for what in (
        lambda: tokenizer.vocab_size,
        lambda: tokenizer.sequence_length(),
        lambda: tokenizer.flatten(quantized.indices),
        lambda: tokenizer.unflatten(ids),
        lambda: tokenizer.decode_indices(quantized.indices),
        lambda: tokenizer.indices_to_codes(quantized.indices),
    ):
        with pytest.raises(ValueError, match="Identity is continuous, it has no integers"):
            what()


class Labelled(Digits):
    """Remembers the labels it was given."""

    accepts_labels = True

    def forward(self, features, labels=None):
        self.labels = labels
        return super().forward(features)


def test_labels_reach_quantizers_that_accept_them_and_no_others():
    batch = {"images": images(), "labels": torch.tensor([3, 1])}
    tokenizer = make(Labelled())
    assert tokenizer.labels_of(batch) is batch["labels"]
    tokenizer(batch["images"], tokenizer.labels_of(batch))
    assert tokenizer.quantizer.labels is batch["labels"]
    assert tokenizer.labels_of({"images": images()}) is None
    assert make(FSQ((5, 5))).labels_of(batch) is None


class Tables(Digits):
    """A learned table beside a learned map, and a part with a table of its own."""

    undecayed = ("table",)

    def __init__(self, part=True):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 2))
        self.map = nn.Linear(2, 2)
        self.stages = nn.ModuleList([Tables(part=False)] * 2 if part else [])


def test_weight_decay_leaves_codebooks_alone():
    tokenizer = make(Tables())
    tables = {"quantizer.table", "quantizer.stages.0.table"}
    assert tokenizer.no_weight_decay() == tables
    assert tables <= dict(tokenizer.named_parameters()).keys()
    optimizer = create_optimizer_v2(tokenizer, opt="adamw", lr=0.5, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in tokenizer.named_parameters()}
    for parameter in tokenizer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {name for name, parameter in tokenizer.named_parameters() if not torch.equal(parameter, before[name])}
    assert not changed & tables
    assert "quantizer.map.weight" in changed
    assert make(FSQ((5, 5))).no_weight_decay() == set()


@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        ("several codebooks", (2, 6), r"\(b, h, w, depth\), got \(2, 6\): call unflatten"),
        ("several codebooks", (2, 3, 3), r"\(b, h, w, depth\), got \(2, 3, 3\): call unflatten"),
        ("scales", (7,), r"\(b, length\), got \(7,\): add the batch axis by indices\[None\]"),
        ("scales of several codebooks", (2, 21), r"\(b, length, depth\), got \(2, 21\): call unflatten"),
    ],
)
def test_indices_of_a_wrong_number_of_axes_are_answered_with_the_axes_of_the_layout(layout, shape, message):
    with pytest.raises(ValueError, match=f"indices must be {message}"):
        make(Digits(**LAYOUTS[layout])).decode_indices(torch.zeros(shape, dtype=torch.int64))
