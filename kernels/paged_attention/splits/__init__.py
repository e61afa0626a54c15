"""Keys that are many are split over programs (work/ says how), whose results are then added up.

Each program computes a softmax over its own part of the keys: the highest score (`maximum`), the sum of the weights
relative to it (`total`), and the weighted sum of the values (`accumulated`). Parts are added by bringing them to the
highest of their maxima:

    m = max(m1, m2, ..)    total = total1 * 2^(m1 - m) + total2 * 2^(m2 - m) + ..    accumulated: the same

They are added as a tree of FAN: a program leaves its part in scratch memory and counts itself as arrived in a group of
FAN neighbours. The last to arrive adds up the group, leaves the sum in the place of the group's first part, and arrives
one level up, where FAN groups are a group. So no program adds up more than FAN parts a level, groups are added up at
the same time, and whoever comes last adds in the same order. No program waits for another, so there is no deadlock
however few of them run at once.

Running example, FAN 8, the 11 chunks of one tile: chunks 0 to 7 are a group and 8 to 10 are one. The last of each adds
up its group; the later of these two adds both sums and writes the result. Counters: 0 and 8 for the groups, 1 for the
level above.

Group k of level l counts at k * FAN^(l + 1) + l. Where it has two members or more, the tile has more than
k * FAN^(l + 1) + FAN^l parts, so that its counter is the tile's own. A group of one, such as the last of level 1 where
there are 65 chunks, does not count.
"""
