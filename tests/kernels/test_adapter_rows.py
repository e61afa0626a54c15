"""Which rows belong to which adapter, and what of the adapters' work a step goes through."""

from kernels.adapter_rows import Segment, ShapeKey, covering, cut, tile_rows


def test_tiles_are_cut_at_their_largest_size() -> None:
    assert cut([Segment(3, 6, 2), Segment(6, 7, 5)], 2) == [(2, 3, 2), (2, 5, 1), (5, 6, 1)]


def test_between_and_behind_spans_are_rows_of_the_base() -> None:
    spans = [Segment(1, 2, 3), Segment(2, 4, 5)]
    assert covering(spans, 6) == [Segment(0, 1, 0), *spans, Segment(4, 6, 0)]
    assert covering(spans, 4) == [Segment(0, 1, 0), *spans]
    assert covering([], 2) == [Segment(0, 2, 0)] and covering([], 0) == []


def test_tiles_are_small_for_few_rows_and_large_for_many() -> None:
    assert [tile_rows(rows) for rows in (1, 512, 513)] == [16, 16, 64]


def test_shapes_join_and_cover_field_by_field() -> None:
    lora, experts = ShapeKey(rank=16), ShapeKey(experts=1)
    both = lora.joined(experts)
    assert both == experts.joined(lora) == ShapeKey(16, 1) and isinstance(both, ShapeKey)
    assert both.covers(lora) and both.covers(experts) and both.covers(both) and both.covers(ShapeKey())
    assert not lora.covers(experts) and not experts.covers(lora) and not lora.covers(ShapeKey(17))
