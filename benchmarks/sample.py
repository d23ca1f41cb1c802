"""Tokens per second of `vistok.prior.generate` beside `transformers` with a Llama of the same size.

    python benchmarks/sample.py --json benchmarks/results/sample.json

Both sides have the same number of blocks, heads and channels, the same feed-forward layers, vocabulary, batch, number
of tokens, dtype and top-k sampling, random weights, and a cache of keys and values; they alternate, and the best time
of each counts. Guided rows draw with classifier-free guidance on both sides: `transformers` runs its model twice per
token, here one batch holds both halves.

A step cannot be faster than its products with the weights, each of which is read once per token. They are measured in
the same run, as bare products of the same shapes: through `F.linear`, as `transformers` has them, and as
`vistok.prior.layers.product_with` has them. The last columns say how near each side comes to its own.
"""

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from _measure import time_alternating
from torch import Tensor, nn

from vistok.prior import GPT, Sampling, generate
from vistok.prior.layers import product_with

TARGET = 2.0
# Of the table, with their digits after the point.
COLUMNS = {
    "ours": 0,
    "transformers": 0,
    "ratio": 2,
    "products": 0,
    "share_of_products": 2,
    "linear": 0,
    "share_of_linear": 2,
}


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Args:
        width: Channels.
        depth: Blocks.
        num_heads: Heads.
        batch_size: Images drawn at once.
        guidance: Scale of classifier-free guidance; 1: none.
        compile: Whether our steps are compiled (`transformers` runs as it does by default).
        grid: Side of the grid of tokens.
        vocab_size: Codes.
        top_k: Of the sampling.
    """

    width: int
    depth: int
    num_heads: int
    batch_size: int
    guidance: float = 1.0
    compile: bool = False
    grid: int = 16
    vocab_size: int = 16384
    top_k: int = 100

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return self.grid**2


SETTINGS = {
    "small, 1 image": Setting(256, 8, 4, 1),
    "small, 8 images": Setting(256, 8, 4, 8),
    "small, 8 images, guided": Setting(256, 8, 4, 8, guidance=2.0),
    "small, 1 image, compiled": Setting(256, 8, 4, 1, compile=True),
    "LlamaGen-B, 1 image": Setting(768, 12, 12, 1),
    "LlamaGen-B, 1 image, guided": Setting(768, 12, 12, 1, guidance=2.0),
    "LlamaGen-B, 8 images, guided": Setting(768, 12, 12, 8, guidance=2.0),
}
QUICK = {"quick": Setting(32, 2, 2, 2, guidance=2.0, grid=4, vocab_size=64, top_k=10)}


def ours(setting: Setting, device: torch.device, dtype: torch.dtype) -> tuple[GPT, Callable[[], Tensor]]:
    """Our model, and a call that draws images."""
    prior = GPT(
        [setting.vocab_size],
        [setting.grid, setting.grid],
        num_classes=1,
        width=setting.width,
        depth=setting.depth,
        num_heads=setting.num_heads,
    )
    torch.nn.init.normal_(prior.head.weight, std=0.02)
    prior = prior.to(device, dtype).eval()
    labels = torch.zeros(setting.batch_size, dtype=torch.int64, device=device)
    sampling = Sampling(top_k=setting.top_k, guidance=setting.guidance)
    backend = "inductor" if setting.compile else None
    return prior, lambda: generate(prior, labels, sampling, compile=backend)


def theirs(setting: Setting, device: torch.device, dtype: torch.dtype) -> tuple[Any, Callable[[], Tensor]]:
    """The Llama of `transformers`, and a call that generates as many tokens."""
    hidden = 256 * -(-(8 * setting.width // 3) // 256)
    # Two ids more: of the class and of none.
    config = transformers.LlamaConfig(
        vocab_size=setting.vocab_size + 2,
        hidden_size=setting.width,
        intermediate_size=hidden,
        num_hidden_layers=setting.depth,
        num_attention_heads=setting.num_heads,
        num_key_value_heads=setting.num_heads,
        max_position_embeddings=setting.num_tokens + 1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).to(device, dtype).eval()
    prompt = torch.full((setting.batch_size, 1), setting.vocab_size, device=device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": setting.num_tokens,
        "do_sample": True,
        "top_k": setting.top_k,
    }
    if setting.guidance != 1:
        options |= {"guidance_scale": setting.guidance, "negative_prompt_ids": prompt + 1}
    return model, lambda: model.generate(prompt, **options)


def products(prior: GPT, rows: int, fast: bool) -> Callable[[], None]:
    """Bare products with all weights of a model, once for each token of an image."""
    weights = [module.weight.detach() for module in prior.modules() if isinstance(module, nn.Linear)]
    product = product_with(weights, rows) if fast else F.linear
    inputs = {weight.shape[1]: weight.new_ones(rows, weight.shape[1]) for weight in weights}

    @torch.inference_mode()
    def run() -> None:
        for _ in range(prior.num_steps):
            for weight in weights:
                product(inputs[weight.shape[1]], weight)

    return run


def measure(setting: Setting, device: torch.device, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Tokens per second of both and of the bare products, their ratios, and the number of parameters.

    Raises:
        ValueError: If the two models are of different size.
    """
    torch.manual_seed(0)
    prior, draw = ours(setting, device, dtype)
    llama, generate_theirs = theirs(setting, device, dtype)
    sizes = [sum(value.numel() for value in model.parameters()) for model in (prior, llama)]
    if abs(sizes[0] - sizes[1]) > 4 * setting.width:  # rows of classes
        raise ValueError(f"the models have {sizes[0]} and {sizes[1]} parameters")
    rows = setting.batch_size if setting.guidance == 1 else 2 * setting.batch_size
    sides = time_alternating(draw, generate_theirs, repeats)
    bare = time_alternating(products(prior, rows, True), products(prior, rows, False), repeats)
    names = ("ours", "transformers", "products", "linear")
    num_tokens = setting.num_tokens * setting.batch_size
    rates = {name: num_tokens / each for name, each in zip(names, (*sides, *bare), strict=True)}
    return rates | {
        "ratio": rates["ours"] / rates["transformers"],
        "share_of_products": rates["ours"] / rates["products"],
        "share_of_linear": rates["transformers"] / rates["linear"],
        "parameters": sizes[0],
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=SETTINGS, help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="how often both sides alternate")
    parser.add_argument("--quick", action="store_true", help="a tiny size, to see that everything works")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    settings = QUICK if arguments.quick else SETTINGS
    results = {}
    columns = ("tokens/s", "transformers", "ratio", "products", "share", "F.linear", "share")
    print(f"{'case':<30}", *(f"{column:>12}" for column in columns), f"   target of the ratio: {TARGET:g}")
    for name in arguments.cases or settings:
        result = measure(settings[name], device, dtype, arguments.repeats)
        results[name] = result | asdict(settings[name])
        row = [f"{result[key]:>12.{digits}f}" for key, digits in COLUMNS.items()]
        print(f"{name:<30}", *row, flush=True)
    if arguments.json:
        record = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
            "threads": arguments.threads,
            "dtype": arguments.dtype,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "measured": time.strftime("%Y-%m-%d"),
            "target": TARGET,
            "cases": results,
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
