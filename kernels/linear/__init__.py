"""linear: y = x W^T + b on a CPU, with the matrix kept in a form that multiplies faster than plain rows do.

Forms (forms.py) compute the same and differ in what they keep of W [out, in]:

    torch           W                    F.linear, the definition
    onednn          W                    oneDNN's product, which brings W into its own order in each call
    onednn-packed   W in oneDNN's order  nothing is brought into order again; `dense` gives W back, bit by bit
    mkl-packed      W, and W in MKL's order, from which nothing gives W back

Which is fastest depends on the CPU, the shape and the number of rows, so it is measured (measure.py). A step has any
number of rows, and oneDNN compiles a program for each number: about 1 ms, and 0.6 MiB that it keeps. So its forms are
given x with rows of zeros below, up to one of few numbers.

Running example: W is 3072 x 512 and a step has 70 rows. They are multiplied as `padded_rows(70)` = 72, and the last two
rows of the result are cut off.
"""

from kernels.linear.forms import FORMS, Form, padded_rows
from kernels.linear.matrix import Matrix
from kernels.linear.measure import measure

__all__ = ["FORMS", "Form", "Matrix", "measure", "padded_rows"]
