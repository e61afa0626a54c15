"""What is done to the logits of some rows before a token is chosen: bias, a grammar's mask, bans and penalties.

The model's own logits stay as they are: what is said of a token's probability is said of those. A mask is read where
the logits are. The rest is a few tokens anywhere in the row: a row that has any of it is copied once, with its edits.

Running example, two rows of a vocabulary of 40. Row 0 has nothing. Row 1 has a mask of two words (all tokens up to 33),
2.5 more for token 7, and penalties over the prompt [5] and the output [9, 9]; its stop token, 3, is banned.

    masks           [[-1, 3]]     mask_rows       [-1, 0]
    places          [-1, 0]       row 1 has the first place in what follows
    bias_starts     [0, 1]        bias_tokens     [7]          biases  [2.5]
    ban_starts      [0, 1]        bans            [3]
    history_starts  [0, 3]        history         [5, 9, 9]    prompt_lens  [1]
"""
