"""Pictures: decoding, transforms, orders, data sets and Lightning data modules.

Everything is exported from here and imported when first used: to decode a picture takes neither Lightning nor
webdataset.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vistok.data.bad_samples import BadSample, BadSampleLimit, BadSampleLog, TooManyBadSamplesError
    from vistok.data.bucket_module import BucketFolderData, BucketShardData
    from vistok.data.buckets import BucketBatchSampler, BucketDataset, CoverTransform
    from vistok.data.decode import BadImageError, decode_image
    from vistok.data.hugging_face import HuggingFaceSet, HuggingFaceShards, HuggingFaceStream
    from vistok.data.image_folder import ImageFolder
    from vistok.data.loader import DeadWorkerError, TrainLoader
    from vistok.data.mixture import MixtureData
    from vistok.data.module import (
        DataModule,
        HuggingFaceData,
        HuggingFaceStreamData,
        ImageFolderData,
        PhotosData,
        TorchvisionData,
        WebDatasetData,
    )
    from vistok.data.photos import Photos
    from vistok.data.pictures import Picture, PictureDataset, PictureSource, PictureStream
    from vistok.data.sampler import EpochBatchSampler
    from vistok.data.tar_pictures import TarPictures
    from vistok.data.torchvision_set import TorchvisionSet
    from vistok.data.transforms import EvalTransform, TrainTransform, to_model_range, to_uint8
    from vistok.data.video import Clip, VideoDataset, VideoFolder, VideoShards
    from vistok.data.video_module import VideoFolderData, VideoShardData
    from vistok.data.webdataset import BadShardError, ShardDataset

_MODULES = {
    "bad_samples": ("BadSample", "BadSampleLimit", "BadSampleLog", "TooManyBadSamplesError"),
    "bucket_module": ("BucketFolderData", "BucketShardData"),
    "buckets": ("BucketBatchSampler", "BucketDataset", "CoverTransform"),
    "decode": ("BadImageError", "decode_image"),
    "hugging_face": ("HuggingFaceSet", "HuggingFaceShards", "HuggingFaceStream"),
    "image_folder": ("ImageFolder",),
    "loader": ("DeadWorkerError", "TrainLoader"),
    "mixture": ("MixtureData",),
    "module": (
        "DataModule",
        "HuggingFaceData",
        "HuggingFaceStreamData",
        "ImageFolderData",
        "PhotosData",
        "TorchvisionData",
        "WebDatasetData",
    ),
    "photos": ("Photos",),
    "pictures": ("Picture", "PictureDataset", "PictureSource", "PictureStream"),
    "sampler": ("EpochBatchSampler",),
    "tar_pictures": ("TarPictures",),
    "torchvision_set": ("TorchvisionSet",),
    "transforms": ("EvalTransform", "TrainTransform", "to_model_range", "to_uint8"),
    "video": ("Clip", "VideoDataset", "VideoFolder", "VideoShards"),
    "video_module": ("VideoFolderData", "VideoShardData"),
    "webdataset": ("BadShardError", "ShardDataset"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BadImageError",
    "BadSample",
    "BadSampleLimit",
    "BadSampleLog",
    "BadShardError",
    "BucketBatchSampler",
    "BucketDataset",
    "BucketFolderData",
    "BucketShardData",
    "Clip",
    "CoverTransform",
    "DataModule",
    "DeadWorkerError",
    "EpochBatchSampler",
    "EvalTransform",
    "HuggingFaceData",
    "HuggingFaceSet",
    "HuggingFaceShards",
    "HuggingFaceStream",
    "HuggingFaceStreamData",
    "ImageFolder",
    "ImageFolderData",
    "MixtureData",
    "Photos",
    "PhotosData",
    "Picture",
    "PictureDataset",
    "PictureSource",
    "PictureStream",
    "ShardDataset",
    "TarPictures",
    "TooManyBadSamplesError",
    "TorchvisionData",
    "TorchvisionSet",
    "TrainLoader",
    "TrainTransform",
    "VideoDataset",
    "VideoFolder",
    "VideoFolderData",
    "VideoShardData",
    "VideoShards",
    "WebDatasetData",
    "decode_image",
    "to_model_range",
    "to_uint8",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
