"""Tensors that lie one behind the other in a file and on the device alike are copied as one."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from server.weights.pace import unhurried
from server.weights.tables.table import Place


class Run(NamedTuple):
    """`num_bytes` of a file from `offset` on, of one type, and where they go."""

    offset: int
    num_bytes: int
    dtype: str
    place: Tensor


class _Stored(NamedTuple):
    """A tensor that is copied as it is: where it begins in the file, and on the device."""

    offset: int
    num_bytes: int
    dtype: str
    place: Tensor
    address: int
    its_bytes: int


def in_runs(places: Sequence[Place]) -> Iterator[Run | list[Place]]:
    """Those of one file, in the order in which they are stored. What lies at one offset and goes to several places, or
    goes there in blocks, stays as it is.

    A small adapter has hundreds of small tensors. Each copy is work of the interpreter, for which the step loop waits.
    """
    run: list[_Stored] = []
    for offset, group in groupby(unhurried(sorted(places, key=_offset)), key=_offset):
        its = list(group)
        tensor, place = its[0]
        if len(its) > 1 or tensor.cut_from is not None:
            yield from _joined(run)
            yield its
            run = []
            continue
        it = _Stored(offset, tensor.num_bytes, tensor.dtype, place, place.data_ptr(), place.nbytes)
        if run and not (place.is_contiguous() and _follows(run[-1], it)):
            yield from _joined(run)
            run = []
        run.append(it)
    yield from _joined(run)


def _offset(place: Place) -> int:
    return place[0].offset


def _follows(one: _Stored, other: _Stored) -> bool:
    return (
        one.offset + one.num_bytes == other.offset
        and one.address + one.its_bytes == other.address
        and one.dtype == other.dtype
        and one.place.dtype is other.place.dtype
    )


def _joined(run: Sequence[_Stored]) -> Iterator[Run]:
    """As one, if the memory of the first goes on to the end of the last."""
    if len(run) > 1 and run[0].place.is_contiguous():
        first, last = run[0], run[-1]
        memory = first.place.untyped_storage()
        if last.address + last.its_bytes <= memory.data_ptr() + memory.nbytes():
            elements = (last.address + last.its_bytes - first.address) // first.place.itemsize
            place = first.place.as_strided((elements,), (1,))
            yield Run(first.offset, last.offset + last.num_bytes - first.offset, first.dtype, place)
            return
    for it in run:
        yield Run(it.offset, it.num_bytes, it.dtype, it.place)
