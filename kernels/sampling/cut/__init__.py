"""Where top-k, top-p and min-p cut a row of logits: found by bisection, without a sort.

What is kept is a prefix of the tokens in the order of (logit descending, id ascending), so it is described by the least
logit kept, and by how many of the tokens that have just this logit are kept, lowest ids first.

Logits are compared as int32 keys in the same order as the float32 numbers. Each step of the search counts, and weighs,
the tokens at or above a key in the middle of the interval that is left, and narrows the interval to keys that occur.
That takes 32 steps at most, 16 for bfloat16 logits, and is exact where logits are equal. What is searched are the few
tokens of the range that bins leave (bins/); the whole row only if they leave none, or the cut is not among them.

Running example, top-k 3 of the logits [2.0, 0.5, 1.0, 1.0, 1.0]. One token lies above 1.0, and four lie at or above it.
So the cut is at 1.0, and of the tokens at 1.0 the first two are kept; with the one above that is ids 0, 2 and 3.
"""
