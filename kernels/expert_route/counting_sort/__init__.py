"""The second half of expert_route for many tokens: (token, choice) pairs in order of place, by a counting sort.

Running example, the four pairs of expert_route's own example, in blocks of one token:

    block                 0       1
    pair                  0  1    2  3
    place                 7  3    3  0
    within its block      0  0    0  0        earlier pairs of the same place in the same block
    counts of place 3     1       1           by block; offsets after the scan: 0, 1, and 2 in all
    starts                place 0: 0    place 3: 1    place 7: 3
    position              3  1    2  0        start of the place + offset of the block + within the block

Counted are columns, not places: the M places of the base, and those of the adapters that have a token in the step. An
adapter's lie at M + (slot - 1) * room, with as much room for each, so columns are in the order of places. With the
adapters 2 and 7 in use and room for 3 experts, M + 3..M + 5 become M..M + 2, and M + 18..M + 20 become M + 3..M + 5.
"""
