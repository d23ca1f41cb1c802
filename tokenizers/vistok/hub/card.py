"""The model card of a bundle: what it is, how to use it, and numbers with the protocol they were measured by."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vistok.quantizer.base import Quantizer
from vistok.tokenizer import Tokenizer

TEMPLATE = """\
---
library_name: vistok
tags: [visual-tokenizer, image-tokenizer]
{licence}---
# {name}

A visual tokenizer: {encoder} encoder, {quantizer} quantizer, {decoder} decoder. One position covers {factor} x
{factor} pixels and is described by {codes}.

```python
import vistok

tok = vistok.load("path/to/this/folder")  # or its hub id
quantized = tok.encode(images)  # images (b {channels} H W) in [-1, 1], H and W multiples of {factor}
{usage}
```

## Preprocessing

{preprocessing}

{origin}## Measured

{measured}
"""

DISCRETE_USAGE = """\
ids = tok.flatten(quantized.indices)  # (b, length), the sequence an autoregressive model learns
images = tok.decode_indices(quantized.indices)"""
CONTINUOUS_USAGE = "images = tok.decode(quantized.codes)  # codes (b {dim} h w), what a diffusion model learns"


def model_card(tokenizer: Tokenizer, name: str, measured: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    """Markdown of the card.

    Args:
        tokenizer: What the card describes.
        name: Title.
        measured: ``metrics``, ``usage`` (columns per codebook, scale and bit), ``protocol`` and ``command`` of an
            evaluation; may be empty.
        origin: Where the weights come from and under which ``licence``; may be empty.
    """
    quantizer = tokenizer.quantizer
    return TEMPLATE.format(
        name=name,
        encoder=type(tokenizer.encoder).__name__,
        quantizer=type(quantizer).__name__,
        decoder=type(tokenizer.decoder).__name__,
        factor=tokenizer.factor,
        channels=tokenizer.channels,
        codes=_codes(quantizer),
        usage=DISCRETE_USAGE if quantizer.codebook_sizes else CONTINUOUS_USAGE.format(dim=quantizer.dim),
        preprocessing=_listing(tokenizer.preprocessing) or "Not recorded.",
        licence=f"license: other\nlicense_name: {json.dumps(origin['licence'])}\n" if "licence" in origin else "",
        origin=f"## Origin\n\n{_listing(origin)}\n\n" if origin else "",
        measured=_measured(measured),
    )


def _codes(quantizer: Quantizer) -> str:
    if not quantizer.codebook_sizes:
        return f"{quantizer.dim} continuous numbers"
    count = "one index" if quantizer.num_codebooks == 1 else f"{quantizer.num_codebooks} indices"
    return f"{count} of {' x '.join(map(str, quantizer.codebook_sizes))} codes ({quantizer.bits:.4g} bits)"


def _measured(measured: Mapping[str, Any]) -> str:
    if not measured.get("metrics"):
        return "Not measured."
    parts = [
        _listing(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in measured["metrics"].items()}
        )
    ]
    for name, columns in measured.get("usage", {}).items():
        if columns:
            heading = name.replace("_", " ").capitalize()
            parts.append(f"{heading}:\n\n" + _listing({key: _short(values) for key, values in columns.items()}))
    if measured.get("protocol"):
        parts.append("Protocol:\n\n" + _listing(measured["protocol"]))
    if measured.get("command"):
        parts.append(f"Command: `{measured['command']}`")
    return "\n\n".join(parts)


def _short(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _listing(values: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- {key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()
    )
