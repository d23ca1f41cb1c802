"""The causal trunk of videos: causality, images as first frames, and every combination of factors."""

import pytest
import torch
import torch.nn.functional as F
from deterministic import fill, waves

import vistok
from vistok.decoder import Causal3DDecoder
from vistok.encoder import Causal3DEncoder
from vistok.layers.causal3d import causal_convolution
from vistok.quantizer import FSQ

TINY = {"base_channels": 8, "channel_multipliers": (1, 2, 2), "num_blocks": 1, "z_channels": 4}


def make(**arguments):
    arguments = {**TINY, **arguments}
    return Causal3DEncoder(**arguments).eval(), Causal3DDecoder(**arguments).eval()


def videos(frames, height=16, width=24, channels=3):
    return torch.rand(2, channels, frames, height, width) * 2 - 1


def test_features_and_frames_are_those_of_cosmos():
    # Computed with diffusers 0.42.1, CosmosEncoder3d and CosmosDecoder3d, from the same weights.
    encoder = fill(Causal3DEncoder(**TINY))
    decoder = fill(Causal3DDecoder(**TINY | {"num_blocks": 2}))
    features = encoder(waves(1, 3, 9, 32, 48))
    expected = torch.tensor([-0.1147736, 1.0010353, 0.7796541, -0.4519130])
    torch.testing.assert_close(features[0, :, 1, 1, 2], expected, atol=1e-5, rtol=0)
    expected = torch.tensor([-0.5365955, -1.5710113, -2.1617200])
    torch.testing.assert_close(decoder(features)[0, :, 4, 5, 7], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("factor", "time_factor", "encoder_size", "decoder_size"),
    [(8, 4, 42717728, 61951616), (8, 8, 42914592, 62738560), (16, 8, 45537056, 65361024)],
)
def test_the_sizes_of_cosmos(factor, time_factor, encoder_size, decoder_size):
    with torch.device("meta"):
        parts = (part(factor=factor, time_factor=time_factor) for part in (Causal3DEncoder, Causal3DDecoder))
        sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    assert sizes == [encoder_size, decoder_size]


@pytest.mark.parametrize("patching", ["haar", "fold"])
@pytest.mark.parametrize("factor", [8, 16])
@pytest.mark.parametrize("time_factor", [1, 4, 8])
def test_every_factor_of_space_and_time(time_factor, factor, patching):
    encoder, decoder = make(factor=factor, time_factor=time_factor, patching=patching)
    batch = videos(1 + 2 * time_factor, 32, 16)
    features = encoder(batch)
    assert features.shape == (2, 4, *encoder.grid(batch.shape[2:])) == (2, 4, 3, 32 // factor, 16 // factor)
    assert decoder(features, size=batch.shape[2:]).shape == batch.shape


@pytest.mark.parametrize("time_factor", [1, 2, 8])
def test_without_patches_the_levels_do_it_all(time_factor):
    levels = (1, 1, 1, 1)
    encoder, decoder = make(
        patch_size=1, patching="none", factor=8, time_factor=time_factor, channel_multipliers=levels
    )
    batch = videos(1 + time_factor)
    features = encoder(batch)
    assert features.shape == (2, 4, 2, 2, 3)
    assert decoder(features).shape == batch.shape


@pytest.mark.parametrize("time_factor", [1, 4, 8])
@pytest.mark.parametrize("options", [{"attention": "none"}, {"attention": "last"}, {"factorised": False}], ids=str)
def test_features_do_not_depend_on_later_frames(time_factor, options):
    encoder, _ = make(time_factor=time_factor, **options)
    batch = videos(1 + 3 * time_factor)
    other = batch.clone()
    other[:, :, 1 + 2 * time_factor :] = videos(time_factor)
    expected, got = encoder(batch), encoder(other)
    torch.testing.assert_close(got[:, :, :3], expected[:, :, :3])
    assert not torch.allclose(got[:, :, 3], expected[:, :, 3])


@pytest.mark.parametrize("time_factor", [1, 4, 8])
@pytest.mark.parametrize("options", [{"attention": "none"}, {"attention": "last"}, {"factorised": False}], ids=str)
def test_frames_do_not_depend_on_later_features(time_factor, options):
    _, decoder = make(time_factor=time_factor, **options)
    features = torch.randn(2, 4, 4, 2, 3)
    other = features.clone()
    other[:, :, 3] = torch.randn(2, 4, 2, 3)
    expected, got = decoder(features), decoder(other)
    kept = 1 + 2 * time_factor
    torch.testing.assert_close(got[:, :, :kept], expected[:, :, :kept])
    assert not torch.allclose(got[:, :, kept:], expected[:, :, kept:])


@pytest.mark.parametrize("factorised", [True, False])
@pytest.mark.parametrize("time_factor", [1, 4, 8])
def test_an_image_is_the_first_frame_of_a_video(time_factor, factorised):
    encoder, decoder = make(time_factor=time_factor, factorised=factorised)
    batch = videos(1 + 2 * time_factor)
    features = encoder(batch)
    image_features = encoder(batch[:, :, 0])
    assert image_features.shape == (2, 4, 2, 3)
    torch.testing.assert_close(image_features, features[:, :, 0])
    torch.testing.assert_close(decoder(image_features), decoder(features)[:, :, 0])


def test_a_convolution_that_is_not_factorised_is_that_of_a_video_behind_two_copies_of_its_first_frame():
    convolution = causal_convolution(2, 3, factorised=False)
    weight, bias = convolution[0].weight, convolution[0].bias
    batch = videos(4, channels=2)
    longer = torch.cat([batch[:, :, :1], batch[:, :, :1], batch], 2)
    torch.testing.assert_close(convolution(batch), F.conv3d(longer, weight, bias, padding=(0, 1, 1)))
    assert weight.shape == (3, 2, 3, 3, 3)


def test_a_still_video_has_the_features_of_its_image_at_every_time():
    encoder, _ = make(attention="none")
    image = videos(1)
    features = encoder(image.expand(-1, -1, 9, -1, -1))
    torch.testing.assert_close(features, features[:, :, :1].expand_as(features))


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channel_counts(channels):
    encoder, decoder = make(channels=channels)
    batch = videos(5, channels=channels)
    assert decoder(encoder(batch)).shape == batch.shape


@pytest.mark.parametrize(
    ("factor", "time_factor", "factorised"), [(8, 1, True), (8, 4, True), (8, 8, True), (16, 8, True), (8, 4, False)]
)
def test_every_parameter_gets_a_gradient(factor, time_factor, factorised):
    parts = make(factor=factor, time_factor=time_factor, factorised=factorised, attention="last")
    parts[1](parts[0](videos(1 + time_factor, 16, 16))).square().mean().backward()
    assert [name for part in parts for name, parameter in part.named_parameters() if parameter.grad is None] == []


def test_a_tokenizer_of_videos_survives_its_bundle(tmp_path):
    encoder, decoder = make()
    tokenizer = vistok.Tokenizer(encoder, FSQ((8, 5)), decoder, preprocessing={"size": [5, 16, 24]}).eval()
    loaded = vistok.load(vistok.save(tokenizer, tmp_path / "bundle"))
    for batch in (videos(5), videos(5)[:, :, 0]):
        indices = loaded.encode(batch).indices
        assert torch.equal(indices, tokenizer.encode(batch).indices)
        assert loaded.decode_indices(indices, batch.shape[2:]).shape == batch.shape
    assert loaded.sequence_length() == 2 * 2 * 3


@pytest.mark.parametrize("part", [Causal3DEncoder, Causal3DDecoder])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time_factor": 2}, "time_factor must be patch_size times a power of 2, got time_factor=2"),
        ({"time_factor": 32}, "time_factor=32 with patch_size=4 halves the grid 3 times, which needs 4 or more levels"),
        ({"factor": 4, "patch_size": 8}, "factor must be patch_size times a power of 2"),
        ({"patching": "none"}, "patching=none and patch_size=4 do not fit"),
        ({"channels": 2}, "channels must be 1, 3 or 4, got 2"),
    ],
)
def test_impossible_arguments_are_errors(part, arguments, message):
    with pytest.raises(ValueError, match=message):
        part(**arguments)


def test_a_number_of_frames_that_does_not_fit_says_what_does():
    encoder, _ = make()
    with pytest.raises(ValueError, match="one frame more than a multiple of 4, got 4: cut it to 1 frames or extend"):
        encoder(videos(4))
