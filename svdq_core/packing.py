"""Two 4-bit codes per byte: the low nibble holds the even column (design of ComfyUI's `svdquant_w4a4`)."""

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Pack codes ``(..., K)`` with values -8...15 into int8 ``(..., K/2)``; only the low 4 bits are kept."""
    codes = codes.to(torch.int16)
    low, high = codes[..., 0::2] & 0xF, codes[..., 1::2] & 0xF
    byte = low | (high << 4)
    return torch.where(byte > 127, byte - 256, byte).to(torch.int8)


def unpack_int4(packed: Tensor) -> Tensor:
    """int8 ``(..., K/2)`` to signed codes int8 ``(..., K)``, -8...7: the shifts sign-extend each nibble."""
    packed = packed.view(torch.int8)
    return torch.stack(((packed << 4) >> 4, packed >> 4), dim=-1).flatten(-2)


def unpack_uint4(packed: Tensor) -> Tensor:
    """int8 ``(..., K/2)`` to unsigned codes uint8 ``(..., K)``, 0...15."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
