"""Latent attention whose forward is known: it writes where the next step reads."""

from server.model.build import Build, Injected
from server.model.families import Foreign
from server.model.latent_attention import OwnLatentAttention, form_of
from server.model.mla import LatentLayer


def inject_latent_attention(build: Build, injected: Injected) -> None:
    for probed, layer in zip(build.probed.attention, injected.layers, strict=True):
        attention: Foreign = probed.module
        if isinstance(layer, LatentLayer) and (form := form_of(attention)) is not None:
            attention.forward = OwnLatentAttention(attention, layer, form)
