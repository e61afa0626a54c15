"""Which program computes what: tiles of queries whose keys are cut into chunks, as many as there is work.

A launch has a number of programs that follows from shapes alone, so that a captured one holds for any lengths. How many
keys are a chunk is found on the device, by every program for itself: the work of all sequences is shared out among the
programs that fill the device, and no chunk is shorter than what pays for adding up its part.

    chunk = max(least, work / spare)        work: the sum of (query tiles * tiles of keys) over the sequences

A sequence's tiles of n keys have n / chunk chunks, rounded up, so all of them together are at most one for each query
tile and `spare` beside: the size of the grid. Programs beyond find nothing and end. So one long context among short
ones is spread over the device, and a batch of equal ones is not cut.

Running example, tiles of 64 keys, chunks of at least 2 of them, spare 4; decodes of 700, 60 and 130 keys:

    tiles of keys   11  1  3      work 15, chunk max(2, 15 / 4 rounded up) = 4
    chunks           3  1  1      programs 0 1 2 | 3 | 4; 5 and 6 find nothing
    parts            3            of what is cut only: at most 2 * spare, since what is cut is longer than a chunk
"""
