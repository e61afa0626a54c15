"""How large a grammar may be, and what making a mask may take. Both sides of each process know these numbers."""

# -- of what a request brings; checked before any work is done for it

MAX_DEPTH = 64  # lists and objects inside one another
MAX_CONTAINERS = 10_000  # lists and objects
MAX_COMMAS = 50_000  # items and properties, nearly
MAX_PROPERTIES = 2_000  # in all objects of a schema together: 0.25 s, and four times as long for twice as many
MAX_ENUM_VALUES = 10_000  # in all enums of a schema together
MAX_CHOICES = 1024
MAX_GRAMMAR_CHARS = 4 << 20  # of a grammar when it is composed, with the tools that may be called instead

# -- of the library (llguidance's LLParserLimits), for one grammar

MAX_GRAMMAR_SIZE = 200_000  # symbols in productions
INITIAL_LEXER_FUEL = 1_000_000  # to build regular expressions: about 50,000 a millisecond
STEP_LEXER_FUEL = 200_000  # for one mask: about 14,000 a millisecond
STEP_MAX_ITEMS = 50_000  # of the Earley parser for one mask: about 20,000 a millisecond
MAX_ITEMS_IN_ROW = 2_000
MOST_SECONDS_A_TOKEN = 0.25  # of a processor: what the library does with a token is counted in nothing of the above
MAX_LEXER_STATES = 50_000  # 1 to 2 KB each

# -- of the text of a schema when it is served

# characters of whitespace in one place, without which a model that likes it would go on for ever
MAX_INDENT = 32  # behind a newline, of which there is one
MAX_SPACES = 4  # without one
MAX_SPACE_BEFORE = 2  # before the first character

# -- of what is remembered

CACHED_OUTCOMES, CACHED_OUTCOME_BYTES = 512, 16 << 20  # in the front: grammars and refusals
CACHED_MATCHERS, CACHED_MATCHER_BYTES = 128, 8 << 20  # beside the engine: bytes of their grammars' text

# -- of the processes

COMPILER_MEMORY_BYTES = 3 << 30  # of addresses
MASKS_MEMORY_BYTES = 8 << 30  # of addresses: matchers of all requests that run
