"""Optimisers: MuonClip, its matrices, its clip of attention logits, schedules."""

from kimijax.optim.muon import adamw, muon
from kimijax.optim.qk_clip import qk_clip
from kimijax.optim.schedules import cosine, wsd

__all__ = ["adamw", "cosine", "muon", "qk_clip", "wsd"]
