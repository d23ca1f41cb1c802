"""Decoding: every mode of a picture file gives the pixels that a person sees."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from vistok.data.decode import BadImageError, check_background, decode_image

RED_GREEN_BLUE = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(image: torch.Tensor) -> list:
    return image.permute(1, 2, 0).tolist()


def kind_of(data) -> str:
    with pytest.raises(BadImageError) as caught:
        decode_image(data)
    return caught.value.kind


def test_rgb_is_read_as_it_is_from_a_file_and_from_bytes(tmp_path):
    data = encode(Image.fromarray(RED_GREEN_BLUE))
    (tmp_path / "a.png").write_bytes(data)
    assert pixels(decode_image(data)) == RED_GREEN_BLUE.tolist()
    assert pixels(decode_image(tmp_path / "a.png")) == RED_GREEN_BLUE.tolist()


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_has_the_pixels_of_pillow(mode, options):
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise).resize((75, 53), Image.Resampling.BICUBIC).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode_image(data).permute(1, 2, 0).numpy(), expected)


def test_exif_orientation_of_a_jpeg_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    assert decode_image(data).shape == (3, 20, 10)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side: to be turned clockwise
    image = decode_image(encode(Image.fromarray(RED_GREEN_BLUE), exif=exif))
    assert pixels(image) == [[[255, 0, 0]], [[0, 255, 0]], [[0, 0, 255]]]


def test_damaged_exif_does_not_spoil_a_good_picture():
    data = encode(Image.fromarray(RED_GREEN_BLUE), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert pixels(decode_image(data)) == RED_GREEN_BLUE.tolist()


def test_palette_is_resolved():
    image = Image.fromarray(RED_GREEN_BLUE).quantize(3)
    assert image.mode == "P"
    assert pixels(decode_image(encode(image))) == RED_GREEN_BLUE.tolist()


def test_transparent_palette_entry_shows_the_background():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    data = encode(image, transparency=0)
    assert pixels(decode_image(data)) == [[[255, 255, 255], [200, 100, 50]]]
    assert pixels(decode_image(data, background=(1, 2, 3))) == [[[1, 2, 3], [200, 100, 50]]]
    assert pixels(decode_image(data, channels=4)) == [[[0, 0, 0, 0], [200, 100, 50, 255]]]


def test_half_transparent_pixel_is_mixed_with_the_background():
    data = encode(Image.new("RGBA", (1, 1), (0, 100, 200, 51)))  # 51 / 255 = 1 / 5
    assert pixels(decode_image(data)) == [[[204, 224, 244]]]
    assert pixels(decode_image(data, background=(0, 0, 0))) == [[[0, 20, 40]]]
    assert pixels(decode_image(data, channels=4)) == [[[0, 100, 200, 51]]]


def test_gray_with_alpha_is_composited():
    data = encode(Image.new("LA", (1, 1), (100, 51)))
    assert pixels(decode_image(data)) == [[[224, 224, 224]]]
    assert pixels(decode_image(data, channels=4)) == [[[100, 100, 100, 51]]]


def test_gray_fills_all_colour_channels():
    assert pixels(decode_image(encode(Image.new("L", (1, 1), 77)))) == [[[77, 77, 77]]]
    assert pixels(decode_image(encode(Image.new("L", (1, 1), 77)), channels=1)) == [[[77]]]


def test_one_channel_is_the_luma_of_the_composited_picture():
    assert pixels(decode_image(encode(Image.fromarray(RED_GREEN_BLUE)), channels=1)) == [[[76], [150], [29]]]
    assert pixels(decode_image(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 0))), channels=1)) == [[[255]]]


def test_bilevel_is_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(decode_image(encode(image))) == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_keeps_its_upper_bits(format):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    image = decode_image(encode(Image.fromarray(values), format), channels=1)
    assert pixels(image) == [[[0], [0], [1], [128], [255]]]


def test_thirty_two_bit_integers_of_sixteen_bit_range_are_scaled():
    values = np.array([[0, 32768, 65535]], dtype=np.int32)
    assert pixels(decode_image(encode(Image.fromarray(values), "TIFF"), channels=1)) == [[[0], [128], [255]]]


def test_cmyk_becomes_rgb():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert pixels(decode_image(encode(image, "TIFF")))[0][0] == [255, 0, 0]
    red = decode_image(encode(image, "JPEG", quality=100))[:, 8, 8].tolist()
    assert np.abs(np.subtract(red, [255, 0, 0])).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    data = encode(
        frames[0], format, save_all=True, append_images=frames[1:], **{"lossless": True} if format == "WEBP" else {}
    )
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 2
    assert pixels(decode_image(data))[2][2] == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_file_is_refused(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    assert kind_of(data[: len(data) // 2]) in {"truncated", "unreadable", "not an image"}
    if format in ("JPEG", "PNG", "BMP"):
        assert kind_of(data[: len(data) // 2]) == "truncated"


def test_damaged_png_is_refused():
    data = bytearray(encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))))
    data[200:260] = bytes(60)
    assert kind_of(bytes(data)) in {"truncated", "unreadable"}


def test_no_bytes_are_called_empty(tmp_path):
    (tmp_path / "a.jpg").touch()
    assert kind_of(b"") == "empty"
    assert kind_of(tmp_path / "a.jpg") == "empty"


def test_text_is_called_no_image():
    assert kind_of(b"<html>404 not found</html>" * 20) == "not an image"


def test_missing_file_is_unreadable(tmp_path):
    assert kind_of(tmp_path / "a.jpg") == "unreadable"


def test_floating_point_picture_is_refused_instead_of_clipped():
    assert kind_of(encode(Image.new("F", (2, 2), 0.5), "TIFF")) == "unreadable"


def test_decompression_bomb_is_too_large():
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )
    assert kind_of(bomb) == "too large"


def test_unknown_number_of_channels_is_named():
    with pytest.raises(ValueError, match="got 2"):
        decode_image(b"", channels=2)


def test_sixteen_bit_colour_keeps_its_upper_bits():
    # PIL writes no such file, so it is put together from its chunks: one pixel of 0, 32768 and 65535.
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    row = zlib.compress(b"\0" + struct.pack(">HHH", 0, 32768, 65535))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", row) + chunk(b"IEND", b"")
    assert pixels(decode_image(data)) == [[[0, 128, 255]]]


def test_picture_of_pillow_is_taken_as_it_is():
    assert pixels(decode_image(Image.new("RGBA", (1, 1), (0, 100, 200, 51)))) == [[[204, 224, 244]]]


@pytest.mark.parametrize(("size", "expected"), [(20, (40, 25)), (25, (40, 25)), (26, (80, 50)), (60, (160, 100))])
def test_reduced_decoding_keeps_the_short_side_asked_for(size, expected):
    data = encode(Image.linear_gradient("L").resize((160, 100)).convert("RGB"), "JPEG")
    image = decode_image(data, reduced_size=size)
    assert (image.shape[2], image.shape[1]) == expected
    whole = Image.fromarray(decode_image(data).permute(1, 2, 0).numpy()).resize(expected, Image.Resampling.BOX)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(whole)).mean() < 3


def test_reduced_decoding_leaves_other_formats_alone():
    data = encode(Image.new("RGB", (160, 100)))
    assert decode_image(data, reduced_size=20).shape == (3, 100, 160)


@pytest.mark.parametrize("background", [(1, 2), (0, 0, 256), (0.5, 0, 0)])
def test_background_that_is_no_colour_is_refused(background):
    with pytest.raises(ValueError, match="three integers from 0 to 255"):
        check_background(background)


def test_colour_of_invisible_pixels_is_black_in_four_channels(tmp_path):
    picture = Image.new("RGBA", (2, 1), (200, 100, 50, 0))
    picture.putpixel((1, 0), (200, 100, 50, 1))
    picture.save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png", channels=4)[:, 0].T.tolist() == [[0, 0, 0, 0], [200, 100, 50, 1]]
