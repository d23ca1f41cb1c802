"""Pictures per second of `vistok export-tokens` beside its encoder and beside one call per picture.

    python benchmarks/export_tokens.py                                     34 photographs in memory: fixed costs count
    python benchmarks/export_tokens.py --shards '/data/val-00000.tar'       pictures of shards, loaded by one process

Three ways to the tokens of the same pictures: the export as a user runs it (loading, encoding,
writing files, manifest and check); the encoder and quantizer alone, on batches that are loaded already; and the loop
of LlamaGen's extraction, one call and one file per picture. The export alternates with each of the other two, and the
best time of each counts.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from _measure import time_alternating

import vistok
from vistok.data import PhotosData, WebDatasetData, to_model_range
from vistok.decoder import CNNDecoder
from vistok.encoder import CNNEncoder
from vistok.quantizer import VectorQuantizer
from vistok.tokens.export import Export, export

# Time of the export in units of the encoder's; and pictures/s in units of the loop's, by type of device.
TARGET_ENCODER = 1.2
TARGET_LOOP = {"cpu": 1.0, "cuda": 5.0}


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", help="tar files of pictures; default: the embedded photographs")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--base-channels", type=int, default=64, help="of the encoder")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="how often the ways alternate")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    trunk = {"patch_size": 4, "base_channels": arguments.base_channels, "num_blocks": 2}
    parts = CNNEncoder(**trunk), VectorQuantizer(16384, 8), CNNDecoder(**trunk)
    size = [arguments.size, arguments.size]
    tokenizer = vistok.Tokenizer(*parts, preprocessing={"size": size}).to(arguments.device).eval()
    options = {"image_size": arguments.size, "eval_size": arguments.size, "num_workers": 0}
    data = WebDatasetData(None, arguments.shards, **options) if arguments.shards else PhotosData(**options)
    work = Export(tokenizer, data, "center", num_views=1, shard_size=10_000, identity={})
    pictures = torch.cat([batch["images"] for batch in data.make_eval_loader(0, 1, raw=True)])
    count = len(pictures)
    batches = to_model_range(pictures).to(arguments.device).split(arguments.batch_size)

    def whole_export() -> None:
        with tempfile.TemporaryDirectory() as folder:
            export(work, Path(folder), arguments.batch_size)

    @torch.inference_mode()
    def encoder_alone() -> None:
        for batch in batches:
            tokenizer.encode(batch)

    @torch.inference_mode()
    def one_call_per_picture() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(count):
                picture = to_model_range(pictures[number : number + 1]).to(arguments.device)
                tokens = tokenizer.flatten(tokenizer.encode(picture).indices)
                np.save(Path(folder) / f"{number}.npy", tokens[None].cpu().numpy())

    to_encoder = time_alternating(whole_export, encoder_alone, arguments.repeats)
    to_loop = time_alternating(whole_export, one_call_per_picture, arguments.repeats)
    print(f"{count} pictures of {arguments.size} px, batches of {arguments.batch_size}, {arguments.threads} threads")
    rates = {"export": min(to_encoder[0], to_loop[0]), "encoder alone": to_encoder[1], "one per call": to_loop[1]}
    print(", ".join(f"{name} {count / time:.1f} pictures/s" for name, time in rates.items()))
    print(f"export / encoder, time: {to_encoder[0] / to_encoder[1]:.2f} (target <= {TARGET_ENCODER:g})")
    target = TARGET_LOOP[torch.device(arguments.device).type]
    print(f"export / one per call, pictures/s: {to_loop[1] / to_loop[0]:.2f} (target >= {target:g})")


if __name__ == "__main__":
    main()
