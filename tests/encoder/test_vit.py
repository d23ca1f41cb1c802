"""The patch transformer of images and videos, and its mirror image."""

import re

import pytest
import torch
from golden import golden
from torch import nn

import vistok
from vistok.decoder import ViTDecoder
from vistok.encoder import ViTEncoder
from vistok.layers.transformer import (
    LearnedPositions,
    SelfAttention,
    TransformerBlock,
    rotary_angles,
    rotate,
    time_samples,
)
from vistok.quantizer import BSQ

TINY = {"patch_size": 4, "image_size": 16, "width": 16, "depth": 2, "num_heads": 2}
ROTARY = {"image_size": None}
IMAGES = {"learned": {}, "rotary": ROTARY}
VIDEOS = {
    "learned": {"time_patch_size": 1, "num_frames": 3},
    "learned, two frames per patch": {"time_patch_size": 2, "num_frames": 5},
    "rotary": ROTARY | {"time_patch_size": 1},
    "rotary, two frames per patch": ROTARY | {"time_patch_size": 2},
}


def make(part, **options):
    """A tiny part whose positions in time are not zero."""
    options = TINY | options
    if part is ViTDecoder:
        options = {"head_width": 24} | options
    made = part(**options)
    if made.trunk.time_positions is not None:
        nn.init.normal_(made.trunk.time_positions)
    return made


@pytest.fixture(params=IMAGES.values(), ids=IMAGES.keys())
def image_options(request):
    return request.param


@pytest.fixture(params=VIDEOS.values(), ids=VIDEOS.keys())
def video_options(request):
    return request.param


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("size", [(16, 16), (8, 32), (24, 4)])
def test_decoder_mirrors_encoder(image_options, channels, size):
    encoder, decoder = (make(part, channels=channels, **image_options) for part in (ViTEncoder, ViTDecoder))
    features = encoder(torch.randn(2, channels, *size))
    assert features.shape == (2, decoder.dim, *encoder.grid(size))
    assert decoder(features).shape == (2, channels, *size)


@pytest.mark.parametrize("frames", [None, 1, 3, 9])
def test_decoder_mirrors_encoder_of_videos(video_options, frames):
    encoder, decoder = make(ViTEncoder, **video_options), make(ViTDecoder, **video_options)
    size = (8, 12) if frames is None else (frames, 8, 12)
    features = encoder(torch.randn(2, 3, *size))
    assert features.shape == (2, decoder.dim, *encoder.grid(size))
    assert decoder(features).shape == (2, 3, *size)


def test_every_parameter_gets_a_gradient(video_options):
    encoder, decoder = make(ViTEncoder, **video_options), make(ViTDecoder, **video_options)
    decoder(encoder(torch.randn(1, 3, 3, 8, 8))).square().sum().backward()
    for part in (encoder, decoder):
        assert [name for name, parameter in part.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("part", [ViTEncoder, ViTDecoder])
def test_later_frames_do_not_change_what_becomes_of_earlier_ones(video_options, part):
    model = make(part, **video_options)
    inputs = torch.randn(1, 3 if part is ViTEncoder else model.dim, 5, 8, 8)
    changed = inputs.clone()
    changed[:, :, 3:] = torch.randn_like(changed[:, :, 3:])
    kept = 1 + 2 // model.time_factor if part is ViTEncoder else 1 + 2 * model.time_factor
    before, after = model(inputs), model(changed)
    torch.testing.assert_close(after[:, :, :kept], before[:, :, :kept])
    assert not torch.allclose(after[:, :, kept:], before[:, :, kept:])


@pytest.mark.parametrize("part", [ViTEncoder, ViTDecoder])
def test_an_image_is_the_first_frame_of_every_video(video_options, part):
    model = make(part, **video_options)
    videos = torch.randn(1, 3 if part is ViTEncoder else model.dim, 7, 8, 8)
    torch.testing.assert_close(model(videos[:, :, 0]), model(videos)[:, :, 0])


def test_attention_per_frame_is_attention_with_a_block_causal_mask():
    attention = SelfAttention(16, 2)
    tokens = torch.randn(2, 12, 16)
    frames = torch.arange(12) // 4
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    scores = query @ key.mT / 8**0.5
    weights = scores.masked_fill(frames[:, None] < frames, -torch.inf).softmax(-1)
    expected = attention.projection((weights @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(tokens, None, 4), expected)


@pytest.mark.parametrize("grid", [(4, 5), (2, 3, 4)])
def test_rotary_scores_depend_on_distances_only(grid):
    query, key = torch.randn(2, 16)
    angles = rotary_angles(grid, 16, torch.device("cpu"))
    cells = torch.cartesian_prod(*(torch.arange(length) for length in grid))
    scores = rotate(query.expand(1, 1, len(cells), -1), angles) @ rotate(key.expand(1, 1, len(cells), -1), angles).mT
    table = {}
    for i, first in enumerate(cells.tolist()):
        for j, second in enumerate(cells.tolist()):
            distance = tuple(a - b for a, b in zip(first, second, strict=True))
            table.setdefault(distance, []).append(scores[0, 0, i, j])
    assert all(torch.stack(same).std(correction=0) < 1e-5 for same in table.values())
    assert torch.stack([same[0] for same in table.values()]).std() > 0.1


def test_learned_positions_of_the_training_grid_are_the_table_and_others_are_samples_of_it():
    positions = LearnedPositions((3, 4), 2)
    ramp = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij"), -1)
    positions.table.data = ramp.flatten(0, 1)
    assert torch.equal(positions((3, 4)), positions.table)
    finer = positions((6, 8)).unflatten(0, (6, 8))
    # Cell centres: the finer grid has half the spacing, and its first centre lies a quarter cell before the table's.
    assert finer[2:4, 3:5, 0].mean().item() == pytest.approx(1.0)
    assert (finer[3, 4] - finer[2, 3]).tolist() == pytest.approx([0.5, 0.5], abs=0.1)


def test_the_first_position_in_time_is_that_of_a_longer_video_too():
    table = torch.randn(3, 4)
    longer = time_samples(table, 5)
    torch.testing.assert_close(longer[::2], table)
    torch.testing.assert_close(longer[1::2], (table[1:] + table[:-1]) / 2)
    assert torch.equal(time_samples(table, 2), table[:2])


@pytest.mark.parametrize("options", [{}, VIDEOS["learned"]], ids=["image", "video"])
@pytest.mark.parametrize("part", [ViTEncoder, ViTDecoder])
def test_gradient_checkpointing_recomputes_each_block_and_changes_nothing(part, options, monkeypatch):
    calls = []
    forward = TransformerBlock.forward
    monkeypatch.setattr(TransformerBlock, "forward", lambda self, *inputs: calls.append(0) or forward(self, *inputs))
    plain, checkpointing = make(part, **options), make(part, gradient_checkpointing=True, **options)
    checkpointing.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 3 if part is ViTEncoder else plain.dim, *([3] if options else []), 8, 8)
    results = []
    for model, expected in ((plain, 2), (checkpointing, 4)):
        calls.clear()
        outputs = model(inputs)
        outputs.square().sum().backward()
        assert len(calls) == expected
        results.append([outputs, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_embedding_and_linear_head_are_the_convolutions_of_vit_vqgan():
    encoder, decoder = make(ViTEncoder, pre_norm=False), make(ViTDecoder, head_width=None)
    encoder.trunk, decoder.trunk = nn.Identity(), nn.Identity()
    images = torch.randn(2, 3, 8, 12)
    embedding = encoder.patch_embedding
    expected = nn.functional.conv2d(images, embedding.weight.unflatten(1, (3, 4, 4)), embedding.bias, stride=4)
    torch.testing.assert_close(encoder(images), expected)
    features = torch.randn(2, 16, 2, 3)
    decoder.to_patch.bias.data = torch.randn(3).repeat_interleave(16)
    weight, bias = decoder.to_patch.weight.T.unflatten(1, (3, 4, 4)), decoder.to_patch.bias[::16]
    torch.testing.assert_close(decoder(features), nn.functional.conv_transpose2d(features, weight, bias, stride=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
        ({"patch_size": 0}, "patch_size must be a positive number of pixels, got 0"),
        ({"image_size": 18}, r"a side or \[H, W\] in multiples of 4 pixels \(patch_size\), got 18"),
        ({"image_size": [16, 16, 16]}, r"a side or \[H, W\]"),
        ({"num_heads": 3}, "width must be a multiple of num_heads, got width 16 and 3 heads"),
        ({"depth": 0}, "depth and mlp_ratio must be positive, got 0 and 4.0"),
        ({"mlp_ratio": 0.0}, "depth and mlp_ratio must be positive"),
        ({"activation": "relu"}, "activation must be gelu or tanh, got 'relu'"),
        (ROTARY | {"num_heads": 16}, "even number of channels per head, 4 or more, got 1: change num_heads"),
        (ROTARY | {"num_heads": 4, "time_patch_size": 1}, "6 or more, got 4: change num_heads"),
        (ROTARY | {"num_frames": 3, "time_patch_size": 1}, "num_frames is for the learned .*, got image_size=None"),
        ({"num_frames": 3}, "num_frames is for the learned positions of videos, .* time_patch_size=None"),
        (
            {"time_patch_size": 1},
            "num_frames is for the learned positions of videos, .* num_frames=None: set all three",
        ),
        ({"time_patch_size": 2, "num_frames": 4}, "num_frames must be one more than a multiple of time_patch_size"),
        (
            {"time_patch_size": 0, "num_frames": 4},
            "time_patch_size must be a positive number of frames, or null, got 0",
        ),
    ],
)
@pytest.mark.parametrize("part", [ViTEncoder, ViTDecoder])
def test_impossible_arguments_are_errors(part, options, message):
    with pytest.raises(ValueError, match=message):
        make(part, **options)


def test_a_head_without_channels_is_an_error():
    with pytest.raises(ValueError, match="head_width must be a positive number of channels, or null, got 0"):
        make(ViTDecoder, head_width=0)


def test_sizes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="crop to 8x8 or resize to 12x8"):
        make(ViTEncoder)(torch.randn(1, 3, 10, 8))
    with pytest.raises(ValueError, match=r"takes images of size \(H, W\), got \(3, 8, 8\)"):
        make(ViTEncoder)(torch.randn(1, 3, 3, 8, 8))
    with pytest.raises(ValueError, match="cut it to 3 frames or extend it to 5"):
        make(ViTEncoder, **VIDEOS["rotary, two frames per patch"])(torch.randn(1, 3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"for images, got features \(1, 16, 3, 2, 2\): set time_patch_size"):
        make(ViTDecoder)(torch.randn(1, 16, 3, 2, 2))
    with pytest.raises(ValueError, match=r"decodes to \(8, 8\) pixels, not to \(20, 20\)"):
        make(ViTDecoder)(torch.randn(1, 16, 2, 2), size=(20, 20))


def test_the_published_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        tokenizer = vistok.Tokenizer(ViTEncoder(), BSQ(bits=18), ViTDecoder())
    assert sum(parameter.numel() for parameter in tokenizer.parameters()) == 174_816_210


# Names of BSQ-ViT (https://github.com/zhaoyue-zephyrus/bsq-vit) and ours.
NAMES = {
    r"transformer\.resblocks\.(\d+)\.": r"trunk.transformer.blocks.\1.",
    r"ln_(\d)\.": r"norm\1.",
    r"attn\.in_proj_": "attention.qkv.",
    r"attn\.out_proj": "attention.projection",
    r"mlp\.c_fc": "mlp.fc1",
    r"mlp\.c_proj": "mlp.fc2",
    r"ln_pre": "trunk.transformer.norm_in",
    r"ln_post": "trunk.transformer.norm_out",
    r"positional_embedding": "trunk.space_positions.table",
    r"conv1": "patch_embedding",
    r"ffn": "head",
    r"conv_out": "to_patch",
    r"^quant_embed": "to_codes",
    r"^post_quant_embed": "from_codes",
}


def renamed(name):
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def test_the_original_program_gives_the_same_indices_and_images():
    weights, io, _ = golden("bsq")
    options = {"patch_size": 8, "image_size": 32, "width": 64, "depth": 2, "num_heads": 2}
    tokenizer = vistok.Tokenizer(ViTEncoder(**options), BSQ(bits=18), ViTDecoder(**options)).eval()
    tokenizer.load_state_dict(
        {renamed(name): tensor for name, tensor in weights.items() if not name.startswith("quantize.")}
    )
    quantized = tokenizer.encode(io["x"])
    assert torch.equal(quantized.indices.flatten(1), io["indices"])
    torch.testing.assert_close(
        tokenizer.decode_indices(quantized.indices).clamp(0, 1), io["decoded"], rtol=0, atol=1e-5
    )
