"""A decode has one query and may have many keys: these are split over programs, whose results are then added up.

Each program computes a softmax over its own part of the keys: the highest score (`maximum`), the sum of the weights
relative to it (`total`), and the weighted sum of the values (`accumulated`). Parts are added by bringing both to the
higher of their maxima:

    m = max(m1, m2)    total = total1 * 2^(m1 - m) + total2 * 2^(m2 - m)    accumulated: the same
"""
