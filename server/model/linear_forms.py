"""Which form a linear's matrix is kept in on a CPU: measured once on each machine, or as the configuration says."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from kernels.linear import FORMS, Form, measure
from kernels.linear.forms import available
from server.model.families import UnsupportedModelError
from server.model.linear_times import LinearTimes, Shape, Times

ROW_CLASSES = (1, 8, 32, 128, 256)  # each stands for those up to it, the last for more too
# smaller ones take a microsecond or ten, most of which is the call: torch's own is the quickest
_LEAST_ELEMENTS = 1 << 16
_LEAST_CLASSES = 3  # that are measured, whatever it takes: with one row all forms are alike
_SHAPE_BUDGET_S = 0.35
_BUDGET_S = 1.2  # for a model; what cannot be measured now is measured at the next start
# how much faster a form must be that takes a second copy of the weights: memory is what is short beside a CPU
_SECOND_COPY_GAIN = 2.0
# and one that is not packed: times are noisy, and most so those of one row, where packing gains least
_UNPACKED_GAIN = 1.15


@dataclass(frozen=True)
class Choice:
    """The form for each row class."""

    by_class: tuple[Form, ...]

    @property
    def forms(self) -> tuple[Form, ...]:
        """Each once."""
        return tuple(dict.fromkeys(self.by_class))

    @property
    def keeps_dense(self) -> bool:
        return any(form.keeps_dense for form in self.forms)

    def __str__(self) -> str:
        if len(self.forms) == 1:
            return self.forms[0].name
        runs = [list(run) for _, run in groupby(zip(ROW_CLASSES, self.by_class, strict=True), key=itemgetter(1))]
        told = [f"{run[-1][1].name} up to {run[-1][0]} rows" for run in runs[:-1]]
        return ", ".join([*told, f"{self.by_class[-1].name} beyond"])


def always(form: Form) -> Choice:
    return Choice((form,) * len(ROW_CLASSES))


def best(times: Times, forms: Sequence[Form], has_dense: bool) -> Choice:
    """The forms that are fastest on the mean over row classes, of those that keep one copy; of two, if that is much
    faster. has_dense: a copy is kept anyway, for somebody else."""
    timed = [form for form in forms if form.name in times]
    plain = [form for form in timed if not form.packs]
    plans = [(plain, _UNPACKED_GAIN)] if plain else []
    for packed in (form for form in timed if form.packs):
        is_second = packed.keeps_dense or has_dense
        plans.append(([packed, *plain], _SECOND_COPY_GAIN * _UNPACKED_GAIN) if is_second else ([packed], 1.0))
    allowed, _ = min(plans, key=lambda plan: _cost(times, plan[0]) + math.log(plan[1]))
    last = len(next(iter(times.values()))) - 1  # classes behind it took too long to be measured
    return Choice(
        tuple(min(allowed, key=lambda form: times[form.name][min(at, last)]) for at in range(len(ROW_CLASSES)))
    )


def _cost(times: Times, forms: Sequence[Form]) -> float:
    """The logarithm of the geometric mean over row classes."""
    fastest = [min(by_form) for by_form in zip(*(times[form.name] for form in forms), strict=True)]
    return sum(map(math.log, fastest)) / len(fastest)


class FormChooser:
    """Chooses for the matrices of one model."""

    def __init__(self, wanted: str, times: LinearTimes) -> None:
        """wanted: the name of a form, or auto."""
        self._wanted, self.times = wanted, times
        self._left_s = _BUDGET_S
        self._available: dict[torch.dtype, tuple[Form, ...]] = {}
        self._has_measured = False

    def choose(self, weight: Tensor, bias: Tensor | None, has_dense: bool) -> Choice:
        """has_dense: the matrix is somebody else's too, and stays."""
        forms = self.available(weight.dtype)
        if self._wanted != "auto":
            named = [form for form in forms if form.name == self._wanted]
            if not named:
                raise UnsupportedModelError(
                    f"linear_form {self._wanted!r} does not work here with {weight.dtype}; these do: auto, "
                    f"{', '.join(form.name for form in forms)}"
                )
            return always(named[0])
        if weight.numel() < _LEAST_ELEMENTS or len(forms) == 1:
            return always(FORMS[0])
        times = self._times(weight, bias, forms)
        return always(_unmeasured(forms, has_dense)) if times is None else best(times, forms, has_dense)

    def available(self, dtype: torch.dtype) -> tuple[Form, ...]:
        if dtype not in self._available:
            self._available[dtype] = available(dtype)
        return self._available[dtype]

    def finish(self) -> None:
        """Keep what was measured."""
        if self._has_measured:
            self.times.save()

    def _times(self, weight: Tensor, bias: Tensor | None, forms: Sequence[Form]) -> Times | None:
        shape = Shape(weight.shape[0], weight.shape[1], weight.dtype, bias is not None)
        known = self.times.get(shape)
        if known is not None and all(form.name in known for form in forms):
            return known
        if self._left_s <= 0:
            return None
        began = time.perf_counter()
        with torch.no_grad():
            found, is_steady = measure(
                weight.detach(), bias, forms, ROW_CLASSES, min(_SHAPE_BUDGET_S, self._left_s), _LEAST_CLASSES
            )
        self._left_s -= time.perf_counter() - began
        if not is_steady:
            return None
        self._has_measured = True
        self.times.put(shape, found)
        return found


def _unmeasured(forms: Sequence[Form], has_dense: bool) -> Form:
    """oneDNN's, which was the fastest wherever anybody measured; its packed form, unless that were a second copy."""
    by_name = {form.name: form for form in forms}
    return by_name.get("onednn" if has_dense else "onednn-packed", FORMS[0])
