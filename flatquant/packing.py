"""Int4 codes in int32 words.

Element ``8 i + j`` of a token lies in bits ``4 j .. 4 j + 3`` of its word ``i``, two's complement.
In memory that is the even element in the low nibble of each byte: the bytes of CUTLASS ``int4b_t``,
of FlatQuant's uint8 packing and of Ascend's int32 output. The host is taken to be little-endian,
as every host of a CUDA device is.
"""

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int8 codes ``[..., features]`` in [-8, 7] into int32 words ``[..., features / 8]``.

    ``features`` must be a multiple of 8. Bits above the low four of a code are dropped.
    """
    low, high = codes[..., 0::2], codes[..., 1::2]
    return ((low & 0xF) | (high << 4)).view(torch.int32)


def unpack_int4(words: Tensor) -> Tensor:
    """Unpack int32 words ``[..., words]`` into int8 codes ``[..., 8 * words]`` in [-8, 7]."""
    pairs = words.contiguous().view(torch.int8)
    # The arithmetic shift to the right extends the sign.
    return torch.stack((pairs << 4 >> 4, pairs >> 4), dim=-1).flatten(-2)
