"""Small videos whose frames tell their numbers."""

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av")

STEP = 5  # of the gray value from one frame to the next, so that a decoded frame tells its number
CODECS = {
    ".mp4": "libx264",
    ".mov": "libx264",
    ".mkv": "libx264",
    ".webm": "libvpx-vp9",
    ".avi": "mpeg4",
    ".gif": "gif",
}


def write_video(path, num_frames=40, rate=25, width=48, height=32, sound=False, **container):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={key: str(value) for key, value in container.items()}) as file:
        stream = file.add_stream(CODECS[path.suffix], rate=rate)
        stream.width, stream.height = width, height
        stream.bit_rate = 4_000_000
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        if path.suffix in (".mp4", ".mov", ".mkv"):
            stream.options = {"g": "12"}
        voice = file.add_stream("libopus", rate=48000) if sound else None
        for number in range(num_frames):
            pixels = np.full((height, width, 3), 20 + STEP * number, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
        if voice is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 48000 * 4), np.int16), "s16", "stereo")
            silence.sample_rate = 48000
            for packet in [*voice.encode(silence), *voice.encode()]:
                file.mux(packet)
    return path


def write_frames(folder, num_frames=10, name="frame_{}.png", height=8):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_frames):
        Image.new("RGB", (12, height), (20 + STEP * number,) * 3).save(folder / name.format(number + 8))
    return folder


def numbers(images):
    """Frame numbers of gray frames, by the value of a pixel in the middle."""
    return [round((float(image[0, image.shape[1] // 2, image.shape[2] // 2]) - 20) / STEP) for image in images]
