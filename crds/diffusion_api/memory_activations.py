"""Written by bench/trainer/activations.py from bench/results/activations.json, which says with what."""

ACTIVATIONS: dict[str, tuple[int, int, int]] = {
    "SD1/Adapter/BF16": (12511232, 7844100, 317711),
    "SD1/Adapter/BF16/checkpointing": (402440, 465216, 73968),
    "SD1/Adapter/FP32": (0, 8102916, 479411),
    "SD1/Adapter/FP32/checkpointing": (8, 452992, 119528),
    "SD1/Decoding/FP32": (0, 0, 196640),
    "SD1/Denoiser/BF16": (1718412800, 7946372, 317323),
    "SD1/Denoiser/BF16/checkpointing": (1717592960, 253316, 55704),
    "SD1/Denoiser/FP32": (8, 8068864, 485091),
    "SD1/Denoiser/FP32/checkpointing": (8, 460032, 120360),
    "SD1/Encoding/FP32": (0, 0, 164608),
    "SD3-medium/Adapter/BF16": (41877504, 511633620, 403550),
    "SD3-medium/Adapter/BF16/checkpointing": (1179656, 36924456, 50860),
    "SD3-medium/Denoiser/BF16": (4058505216, 655920156, 505346),
    "SD3-medium/Denoiser/BF16/checkpointing": (4053477376, 27406511, 27481),
    "SD3.5-medium/Adapter/BF16": (46989312, 660633300, 656422),
    "SD3.5-medium/Denoiser/BF16": (4485385216, 904897052, 881450),
    "SD3.5-medium/Denoiser/BF16/checkpointing": (4476687360, 30583300, 28512),
    "SDXL/Adapter/FP32/checkpointing": (8, 1043072, 67690),
}
"""Bytes by case: fixed, per image, per image and latent position."""
