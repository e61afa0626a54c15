"""What an answer must spell: grammars that requests bring, compiled and turned into masks of tokens by llguidance.

Both happen in processes that can be killed: who wrote a grammar is a stranger. Nobody else imports the library.
"""
