"""Parts: what they are made of, and what is told of them."""

from adapters_store.parts import (
    AdapterPackage,
    ExpertReplacement,
    LowRank,
    SourceFile,
    TensorRef,
    Whole,
    by_kind,
    describe,
)


def tensor(*shape: int, dtype: str = "F32") -> TensorRef:
    return TensorRef("file", "key", shape, dtype)


def low_rank(module: str, rank: int, scale: float) -> LowRank:
    return LowRank(module, tensor(rank, 8), tensor(6, rank), scale)


def replacement(layer: int, expert: int) -> ExpertReplacement:
    return ExpertReplacement(layer, expert, (tensor(6, 8), tensor(6, 8)), tensor(8, 6))


def package(*parts: LowRank | ExpertReplacement) -> AdapterPackage:
    files = (SourceFile("a", "/a", 70, ""), SourceFile("b", "/b", 7, ""))
    return AdapterPackage("lora", "revision", files, parts)


def test_sizes_are_those_of_the_tensors_and_of_the_files() -> None:
    assert (tensor(3, 5).num_elements, tensor(3, 5).num_bytes, tensor(3, 5, dtype="BF16").num_bytes) == (15, 60, 30)
    assert tensor(3, 5, dtype="F16").num_bytes == 30
    whole = package(low_rank("q", 2, 1.0), replacement(1, 0))
    assert whole.num_elements == (2 * 8 + 6 * 2) + 3 * 48 and whole.file_bytes == 77


def test_a_parts_tensors_come_in_the_order_of_its_formula() -> None:
    a, b = tensor(2, 8), tensor(6, 2)
    assert LowRank("q", a, b, 1.0).tensors == (a, b)
    gate, up, down, both = tensor(6, 8), tensor(5, 8), tensor(8, 6), tensor(12, 8)
    assert ExpertReplacement(1, 0, (gate, up), down).tensors == (gate, up, down)
    assert ExpertReplacement(1, 0, (both,), down).tensors == (both, down)


def test_a_lora_is_told_by_its_linears_with_rank_and_scale() -> None:
    assert describe(package(low_rank("q", 2, 1.5), low_rank("v", 3, 0.5))) == {
        "bound_tensors": 1,
        "linears": {"q": {"rank": 2, "scale": 1.5}, "v": {"rank": 3, "scale": 0.5}},
    }


def test_replaced_experts_are_told_by_layer_in_their_order() -> None:
    assert describe(package(replacement(10, 0), replacement(2, 5), replacement(2, 1))) == {
        "bound_tensors": 1,
        "experts": {"2": [1, 5], "10": [0]},
    }


def test_what_has_both_is_told_by_both() -> None:
    mixed = (replacement(1, 0), low_rank("q", 2, 1.0), replacement(1, 1))
    assert set(describe(package(*mixed))) == {"bound_tensors", "linears", "experts"}
    assert by_kind(mixed) == {ExpertReplacement: [mixed[0], mixed[2]], LowRank: [mixed[1]]}
    assert by_kind(()) == {} and describe(package()) == {"bound_tensors": 0}


def test_a_block_of_a_larger_tensor_has_its_own_size_and_lies_in_the_larger_ones_bytes() -> None:
    block = TensorRef("file", "key", (2, 3), "F16", 64, Whole((8, 9), (4, 6)))
    assert (block.num_elements, block.num_bytes, block.stored_elements) == (6, 12, 72)
    assert tensor(2, 3).stored_elements == 6
