"""What an adapter is checked against: the shapes of the base model, without the model.

The engine process reads the spec off the loaded model; the front process receives it as a message.
"""

import msgspec


class ExpertStack(msgspec.Struct, frozen=True):
    """The routed experts of one MoE layer, in the module `name` ("model.layers.3.mlp.experts").

    One expert is gate [I, H], up [I, H] and down [H, I]. `transposed`: the base stores them as [in, out];
    `interleaved`: gate and up alternate among the rows of one matrix; `biased`: they have biases. `num_shared`: experts
    of the same size that every token takes beside the others, and which have numbers behind theirs.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    name: str
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False
    num_shared: int = 0

    @property
    def is_plain(self) -> bool:
        """The only form that ESFT adapters exist for."""
        return not (self.transposed or self.interleaved or self.biased)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """(out, in) of what low-rank parts may act on, by name of the module. gate_up_proj is gate over up (or the two
        interleaved); where they are not interleaved each may be meant alone."""
        hidden, inner = self.hidden_size, self.intermediate_size
        apart = {} if self.interleaved else {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
        found = {"gate_up_proj": (2 * inner, hidden), **apart, "down_proj": (hidden, inner)}
        return {f"{self.name}.{matrix}": shape for matrix, shape in found.items()}


class BaseSpec(msgspec.Struct, frozen=True):
    """Linears (routers among them) by module name as (out_features, in_features), and expert stacks by layer index.

    `biased`: every module of the base that has a bias, norms and experts too. `fused`: linears that other models have
    in parts, with the rows of each part in order: q, k and v, or gate and up.
    """

    model_type: str
    linears: dict[str, tuple[int, int]]
    experts: dict[int, ExpertStack]
    biased: frozenset[str] = frozenset()
    fused: dict[str, tuple[int, ...]] = {}
