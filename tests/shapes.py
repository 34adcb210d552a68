"""Sizes of the inputs of LLM linear layers, as the factor sizes (M, N) that FlatQuant gives them.

From the published configurations of the models named: hidden and intermediate sizes, and what is
left of them on one GPU under row-wise tensor parallelism. tests/test_decompose.py derives every
pair again.
"""

# (M, N): where M * N features occur.
WHOLE = {
    (24, 24): "SmolLM2-135M hidden",
    (24, 32): "Qwen3-30B-A3B expert",
    (28, 32): "Qwen2.5-0.5B",
    (32, 32): "Qwen3-0.6B",
    (32, 36): "Gemma3-1B",
    (32, 48): "Qwen2.5-1.5B, SmolLM2-135M down",
    (32, 64): "Llama-3.2-1B",
    (48, 48): "Gemma2-2B",
    (40, 64): "Qwen3-4B",
    (48, 60): "gpt-oss",
    (48, 64): "Llama-3.2-3B, Phi-3-mini",
    (56, 64): "Qwen2.5-7B, Gemma2-9B",
    (60, 64): "Gemma3-12B",
    (64, 64): "Llama-2/3-8B, Mistral-7B, Qwen3-8B",
    (64, 72): "Gemma2-27B",
    (64, 76): "Qwen2.5-0.5B down",
    (64, 80): "Llama-2-13B, Qwen2.5-14/32B",
    (64, 84): "Gemma3-27B",
    (64, 96): "Qwen3-1.7B down",
    (72, 96): "Gemma3-1B down",
    (64, 112): "DeepSeek-V3",
    (64, 128): "Llama-70B, Qwen2.5-72B",
    (80, 112): "Qwen2.5-1.5B down",
    (96, 96): "Gemma2-2B down",
    (76, 128): "Qwen3-4B down",
    (80, 128): "Gemma3-4B down",
    (86, 128): "Llama-2-7B, Qwen2.5-3B down",
    (96, 128): "Qwen3-8B down",
    (108, 128): "Llama-2-13B, Qwen2.5-14B down",
    (112, 128): "Llama-3-8B, Mistral-7B down",
    (120, 128): "Gemma3-12B down",
    (128, 128): "Llama-405B hidden",
    (128, 136): "Qwen3-14B down",
    (128, 140): "Phi-4 down",
    (128, 144): "DeepSeek-V3 dense",
    (128, 148): "Qwen2.5-7B down",
    (128, 168): "Gemma3-27B down",
    (160, 160): "Qwen3-32B down",
    (128, 214): "EXAONE-4-33B down",
    (144, 192): "Qwen2.5-32B down",
    (128, 224): "Llama-70B down",
    (168, 176): "Qwen2.5-72B down",
    (128, 256): "large MoE",
    (192, 192): "Gemma2-27B down",
    (208, 256): "Llama-405B down",
}

# (M, N) of a half, a quarter or an eighth of the above; here N is often no multiple of 8.
SHARDS = [
    (8, 12),
    (12, 16),
    (16, 16),
    (18, 20),
    (16, 24),
    (16, 32),
    (16, 38),
    (24, 30),
    (24, 36),
    (28, 40),
    (32, 38),
    (32, 40),
    (16, 86),
    (36, 40),
    (36, 48),
    (32, 56),
    (40, 48),
    (34, 64),
    (40, 56),
    (32, 74),
    (38, 64),
    (48, 56),
    (32, 86),
    (50, 64),
    (16, 214),
    (54, 64),
    (56, 66),
    (64, 68),
    (64, 70),
    (64, 74),
    (64, 86),
    (80, 80),
    (64, 104),
    (32, 214),
    (84, 88),
    (80, 96),
    (68, 128),
    (74, 128),
    (96, 112),
    (100, 128),
    (104, 128),
    (64, 214),
    (112, 132),
    (128, 208),
]

# No model has these. They hold what the others do not: sizes of 1, odd and prime sizes, M > N, one
# size far larger than the other, and features that are no multiple of 8.
ODD = [
    (1, 1),
    (1, 8),
    (7, 1),
    (3, 5),
    (5, 3),
    (13, 17),
    (33, 31),
    (65, 24),
    (1, 300),
    (300, 1),
    (4, 512),
    (129, 8),
    (193, 64),
    (2, 4100),  # larger than simt keeps in any GPU's shared memory
]

SIZES = [*WHOLE, *SHARDS]

# Of these with N no multiple of 8, what sm90 serves in 16 bits nevertheless.
RAGGED = {(48, 60), (64, 68), (64, 76), (64, 84), (112, 132), (128, 140), (128, 148)}
