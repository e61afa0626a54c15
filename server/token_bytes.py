"""The bytes that single tokens stand for, whatever kind of vocabulary they are of."""

from tokenizers import Tokenizer, pre_tokenizers


class TokenBytes:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        # the letters that byte-level vocabularies write bytes with: those that print, and from 256 on for the rest
        plain = [byte for byte in range(256) if chr(byte) in alphabet]
        rest = [byte for byte in range(256) if byte not in plain]
        self._byte_of = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}
        self._is_byte_level = "ByteLevel" in _kinds(tokenizer)
        self._anchor = next(iter(tokenizer.encode("a", add_special_tokens=False).ids), None)
        self._added = tokenizer.get_added_tokens_decoder()

    @property
    def before_any_word(self) -> list[int]:
        """A token behind which others are decoded as in the middle of a text: at its beginning decoders drop the space
        before a word."""
        return [] if self._anchor is None else [self._anchor]

    def of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        name = self._tokenizer.id_to_token(token)
        if name is None:  # the model has rows that the tokenizer has no words for
            return b""
        if self._is_byte_level and all(letter in self._byte_of for letter in name):
            return bytes(self._byte_of[letter] for letter in name)
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        return self._inside_a_text(token).encode()

    def _inside_a_text(self, token: int) -> str:
        before = self._tokenizer.decode(self.before_any_word, skip_special_tokens=False)
        both = self._tokenizer.decode([*self.before_any_word, token], skip_special_tokens=False)
        return both[len(before) :]


def _kinds(tokenizer: Tokenizer) -> str:
    """The decoder's description."""
    return "" if tokenizer.decoder is None else repr(tokenizer.decoder)
