"""A matrix, kept in as many forms as its products read."""

from collections.abc import Sequence

from torch import Tensor

from kernels.linear.forms import Form


class Matrix:
    """W [out, in]. Whoever made it from a parameter lets go of that: it is kept here only if a form reads it."""

    def __init__(self, weight: Tensor, forms: Sequence[Form], keep_dense: bool = False) -> None:
        """keep_dense: W is somebody else's too and stays anyway, so keeping it costs nothing."""
        weight = weight.detach()
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])
        self.dtype = weight.dtype
        self._forms = {form.name: form for form in forms}
        self._packed = {form.name: packed for form in forms if (packed := form.pack(weight)) is not None}
        can_say = any(not form.keeps_dense for form in forms)
        reads_it = any(form.keeps_dense for form in forms)
        self._weight = weight if reads_it or keep_dense or not can_say else None

    @property
    def copies(self) -> int:
        """Of the matrix, that are kept: packed ones and the plain one."""
        return len(self._packed) + (self._weight is not None)

    def product(self, form: Form, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in] -> [T, out], by one of the forms."""
        return form.product(x, self._weight, self._packed.get(form.name), bias)

    def dense(self) -> Tensor:
        """[out, in], the bits that were packed. Where they are packed only, they are unpacked anew by each call."""
        if self._weight is not None:
            return self._weight
        for name, packed in self._packed.items():
            if (weight := self._forms[name].dense(packed)) is not None:
                return weight
        raise AssertionError("a matrix that no form can give back is kept")
