"""Gradient estimators of the quantization step: the value of the codes, a gradient for the features."""

import torch
from jaxtyping import Float
from torch import Tensor

# Below this length a vector has no direction in float32.
TINY = 1e-12


def straight_through(features: Float[Tensor, "..."], codes: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Value of `codes`, gradient of the identity for `features` (Y. Bengio et al., https://arxiv.org/abs/1308.3432)."""
    # The difference is zero, so the value is exact.
    return codes.detach() + (features - features.detach())


def rotate(
    features: Float[Tensor, "n d"], codes: Float[Tensor, "n d"], tangential: bool = False
) -> Float[Tensor, "n d"]:
    """Rotation trick: value of `codes`, gradient of the rotation and scaling that takes each feature to its code.

    C. Fifty et al.: Restructuring Vector Quantization with the Rotation Trick, https://arxiv.org/abs/2410.06424,
    section 4. With unit vectors ``u`` of the feature and ``q`` of the code and ``w`` of ``u + q``, the rotation is
    ``R = I - 2 w w' + 2 q u'``; it is constant for the gradient.

    Args:
        features: What was quantized.
        codes: Their codes; they get no gradient.
        tangential: False differentiates ``|code| / |feature| R feature`` with a constant ratio (Table 1 of the paper).
            True differentiates ``|code| R (feature / |feature|)``, which removes the component of the gradient along
            the feature (the paper's VQGAN and ViT-VQGAN).

    Returns:
        Rows where a vector is zero or feature and code are opposite have no such rotation: straight-through.
    """
    z, e = features.detach(), codes.detach()
    z_length, e_length = z.norm(dim=-1, keepdim=True), e.norm(dim=-1, keepdim=True)
    u, q = z / z_length.clamp(min=TINY), e / e_length.clamp(min=TINY)
    middle = u + q
    middle_length = middle.norm(dim=-1, keepdim=True)
    w = middle / middle_length.clamp(min=TINY)
    # Near-opposite vectors have a middle of rounding errors only.
    defined = (z_length > TINY) & (e_length > TINY) & (middle_length > 1e-4)
    if tangential:
        moving, scale = features / features.norm(dim=-1, keepdim=True).clamp(min=TINY), e_length
    else:
        moving, scale = features, torch.where(defined, e_length / z_length.clamp(min=TINY), 1.0)
    along_w = (moving * w).sum(-1, keepdim=True)
    along_u = (moving * u).sum(-1, keepdim=True)
    rotated = scale * (moving - 2 * along_w * w + 2 * along_u * q)
    rotated = torch.where(defined, rotated, features)
    # The rotation meets the code only up to rounding; the decoder gets the code itself.
    return straight_through(rotated, e)
