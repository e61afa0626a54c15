"""Grammars as llguidance runs them. Imported in the two processes of this room only."""

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from server.grammars import limits, words

_LIMITS = LLParserLimits(
    max_items_in_row=limits.MAX_ITEMS_IN_ROW,
    initial_lexer_fuel=limits.INITIAL_LEXER_FUEL,
    step_lexer_fuel=limits.STEP_LEXER_FUEL,
    step_max_items=limits.STEP_MAX_ITEMS,
    max_lexer_states=limits.MAX_LEXER_STATES,
    max_grammar_size=limits.MAX_GRAMMAR_SIZE,
    precompute_large_lexemes=True,
    verbose_errors=False,
)


class Refusal(Exception):
    """Of a grammar; `error` is what the library says (words.py)."""

    def __init__(self, error: str) -> None:
        super().__init__(words.plain(error))
        self.error = error


def matcher_of(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """Takes up to a second. Raises Refusal."""
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=_LIMITS)
    require_sound(matcher)
    return matcher


def require_sound(matcher: LLMatcher) -> None:
    """To be asked after each mask, for one of a broken matcher looks like one that allows the end. Raises Refusal."""
    if matcher.is_error():
        raise Refusal(matcher.get_error())
