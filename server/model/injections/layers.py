"""Decoder layers, whose sums and norms are one launch each."""

from server.model.build import Build, Injected
from server.model.decoder_layers import DecoderLayer, loop_of, parts_of
from server.model.families import Foreign
from server.model.fused_attention import fuse_attention
from server.model.residual import ResidualStream, StreamEnd


def inject_layers(build: Build, injected: Injected) -> None:
    """After everything that is inside of them."""
    names = {module: name for name, module in build.model.named_modules()}
    attentions = [it.module for it in build.probed.attention]
    layers: list[Foreign] = [build.model.get_submodule(names[it].rpartition(".")[0]) for it in attentions]
    model: Foreign = build.model
    # without its head, which Llama 4 has under another name than it says
    body = model.base_model if model.base_model is not model else model.model
    loop = loop_of(body, layers) if len(set(layers)) == len(layers) else None
    if loop is None:
        return
    all_parts = [parts_of(*it) for it in zip(layers, attentions, loop.given, strict=True)]
    for attention, parts, given in zip(attentions, all_parts, loop.given, strict=True):
        fuse_attention(attention, given if parts is None else {name: given[name] for name in parts.passed})
    stream = ResidualStream() if loop.final is not None and None not in all_parts else None
    for index, (layer, parts) in enumerate(zip(layers, all_parts, strict=True)):
        if parts is not None:
            layer.forward = DecoderLayer(parts, stream, is_first=index == 0)
    if stream is not None and loop.final is not None:
        end: Foreign = loop.final
        end.forward = StreamEnd(loop.final, stream)
