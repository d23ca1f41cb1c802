"""Pictures: decoding, transforms, orders, data sets and Lightning data modules.

Everything is exported from here and imported when first used: to decode a picture takes neither Lightning nor
webdataset.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vistok.data.bad_samples import BadSample, BadSampleLog
    from vistok.data.decode import BadImageError, decode_image
    from vistok.data.image_folder import ImageFolder
    from vistok.data.loader import TrainLoader
    from vistok.data.module import DataModule, ImageFolderData, PhotosData, WebDatasetData
    from vistok.data.photos import Photos
    from vistok.data.sampler import EpochBatchSampler
    from vistok.data.transforms import EvalTransform, TrainTransform, to_model_range, to_uint8
    from vistok.data.webdataset import ShardDataset

_MODULES = {
    "bad_samples": ("BadSample", "BadSampleLog"),
    "decode": ("BadImageError", "decode_image"),
    "image_folder": ("ImageFolder",),
    "loader": ("TrainLoader",),
    "module": ("DataModule", "ImageFolderData", "PhotosData", "WebDatasetData"),
    "photos": ("Photos",),
    "sampler": ("EpochBatchSampler",),
    "transforms": ("EvalTransform", "TrainTransform", "to_model_range", "to_uint8"),
    "webdataset": ("ShardDataset",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BadImageError",
    "BadSample",
    "BadSampleLog",
    "DataModule",
    "EpochBatchSampler",
    "EvalTransform",
    "ImageFolder",
    "ImageFolderData",
    "Photos",
    "PhotosData",
    "ShardDataset",
    "TrainLoader",
    "TrainTransform",
    "WebDatasetData",
    "decode_image",
    "to_model_range",
    "to_uint8",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
