"""The two halves of a low-rank product, for one tile of rows and one slice.

shrink    z = x[rows] @ a.T               to the adapter's rank, over a part of the depth
expand    y[rows] += scale * z @ b.T      with z summed over the parts of the depth; then the gain, if there is one
"""
