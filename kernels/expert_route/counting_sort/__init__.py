"""The second half of expert_route for many tokens: (token, choice) pairs in order of place, by a counting sort.

Running example, the four pairs of expert_route's own example, in blocks of one token:

    block                 0       1
    pair                  0  1    2  3
    place                 7  3    3  0
    within its block      0  0    0  0        earlier pairs of the same place in the same block
    counts of place 3     1       1           by block; offsets after the scan: 0, 1, and 2 in all
    starts                place 0: 0    place 3: 1    place 7: 3
    position              3  1    2  0        start of the place + offset of the block + within the block
"""
