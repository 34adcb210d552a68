"""The activations that one transformer block of a public model quantises, by size.

From the published configurations. tests/test_benchmarks.py checks that every size is one that
tests/shapes.py lists.
"""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """Input sizes of a block's linear layers."""

    hidden: int  # of q/k/v and of gate/up
    attention: int  # of o: heads * head size, not always the hidden size
    intermediate: int  # of down

    @property
    def layers(self) -> dict[str, int]:
        """What is quantised once per block: layers that share an input share its codes."""
        return {
            "q/k/v": self.hidden,
            "o": self.attention,
            "gate/up": self.hidden,
            "down": self.intermediate,
        }


MODELS = {
    "smollm2-135m": Model(576, 576, 1536),
    "llama-3.2-1b": Model(2048, 2048, 8192),
    "llama-3.2-3b": Model(3072, 3072, 8192),
    "llama-2-7b": Model(4096, 4096, 11008),
    "llama-2-13b": Model(5120, 5120, 13824),
    "llama-3-8b": Model(4096, 4096, 14336),
    "llama-3-70b": Model(8192, 8192, 28672),
    "llama-3-405b": Model(16384, 16384, 53248),
    "mistral-7b": Model(4096, 4096, 14336),
    "qwen2.5-7b": Model(3584, 3584, 18944),
    "qwen2.5-14b": Model(5120, 5120, 13824),
    "qwen2.5-32b": Model(5120, 5120, 27648),
    "qwen2.5-72b": Model(8192, 8192, 29568),
    "qwen3-8b": Model(4096, 4096, 12288),
    "qwen3-32b": Model(5120, 8192, 25600),
}


def sizes(names: list[str]) -> list[int]:
    """The distinct sizes of these models, ascending."""
    return sorted({size for name in names for size in MODELS[name]})
