"""Scores of pictures that are drawn on the way: CLIP score, and KID between drawn and held-out pictures.

Belongs here: the CLIP model that looks at pictures, what is computed from what it says (by torchmetrics), and which
pictures are drawn for it. Does not belong here: how pictures are drawn (`sampling`), when, and where scores go
(`evaluation`).

The CLIP model is hostile input as any model: safetensors only, files of known names, no code, no network.
"""
