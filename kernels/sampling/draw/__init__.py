"""The draw: what was gathered of a row becomes a token.

The exact cut is looked for among the tokens of the range. Each part then weighs what lies above the range in it, and
what of the range is kept; the draw falls into one part, and only that one is read.

Running example, one row of three parts that weigh .5, .3 and .2 above the range. In the range are token 40 of part 0
and tokens 90 and 95 of part 1, of which the cut keeps the first two, weighing .1 each. So the parts weigh .6, .4 and
.2; a draw of .75 is .9 of 1.2, in part 1, where .3 is left to go from its first token on.
"""
