"""The layout of int4 codes in int32 words, by hand and both ways."""

from __future__ import annotations

import pytest
import torch

from flatquant.packing import pack_int4, unpack_int4


def as_int32(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


@pytest.mark.parametrize(
    "codes, word",
    [
        ([0, 0, 0, 0, 0, 0, 0, 0], 0x00000000),
        ([1, 0, 0, 0, 0, 0, 0, 0], 0x00000001),
        ([0, 1, 0, 0, 0, 0, 0, 0], 0x00000010),
        ([0, 0, 0, 0, 0, 0, 0, 7], 0x70000000),
        ([0, 0, 0, 0, 0, 0, 0, -8], 0x80000000),
        ([-1, 0, 0, 0, 0, 0, 0, 0], 0x0000000F),
        ([-1, -1, -1, -1, -1, -1, -1, -1], 0xFFFFFFFF),
        ([0, 1, 2, 3, 4, 5, 6, 7], 0x76543210),
        ([-8, -7, -6, -5, -4, -3, -2, -1], 0xFEDCBA98),
    ],
)
def test_element_j_lies_in_bits_4j_to_4j_plus_3(codes: list[int], word: int) -> None:
    assert pack_int4(torch.tensor(codes, dtype=torch.int8)).tolist() == [as_int32(word)]
    assert unpack_int4(torch.tensor([as_int32(word)], dtype=torch.int32)).tolist() == codes


@pytest.mark.parametrize("others", [0, 7, -8, -1])
def test_every_code_survives_in_every_position(others: int) -> None:
    codes = torch.full((16, 8, 8), others, dtype=torch.int8)
    for code in range(-8, 8):
        for position in range(8):
            codes[code + 8, position, position] = code
    words = pack_int4(codes)
    for code in range(-8, 8):
        for position in range(8):
            assert words[code + 8, position].item() >> 4 * position & 0xF == code & 0xF
    assert torch.equal(unpack_int4(words), codes)


def test_word_i_holds_elements_8i_to_8i_plus_7() -> None:
    codes = torch.tensor([[1] * 8 + [2] * 8 + [3] * 8], dtype=torch.int8)
    assert pack_int4(codes).tolist() == [[0x11111111, 0x22222222, 0x33333333]]


def test_bytes_hold_the_even_element_in_the_low_nibble() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)
    even, odd = codes[0::2].int() & 0xF, codes[1::2].int() & 0xF
    assert pack_int4(codes).view(torch.uint8).tolist() == (even | odd << 4).tolist()


@pytest.mark.parametrize("shape", [(8,), (0, 16), (5, 24), (2, 0, 8), (2, 3, 4096)])
def test_unpacking_undoes_packing(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    words = pack_int4(codes)
    assert (words.dtype, words.shape) == (torch.int32, (*shape[:-1], shape[-1] // 8))
    assert torch.equal(unpack_int4(words), codes)


def test_strided_codes_and_words_are_read_as_they_lie() -> None:
    codes = torch.randint(-8, 8, (6, 64), dtype=torch.int8)
    words = pack_int4(codes)
    assert torch.equal(pack_int4(codes[::2, 8:48]), words[::2, 1:6])
    assert torch.equal(unpack_int4(words[::2, ::2]), codes.view(6, 8, 8)[::2, ::2].flatten(1))
