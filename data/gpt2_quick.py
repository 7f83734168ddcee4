"""GPT-2's tokens by gigatoken: the ones that tiktoken makes, at many times its speed.

tiktoken is the definition. gigatoken takes over where it is installed and has encoded a text of awkward cases alike;
texts on which the two are known to differ stay with tiktoken. Source: DESIGN section 5.
"""

import functools
import tempfile
from base64 import b64encode
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np

from data.corpora import warn

REMEMBERED = 1 << 27  # bytes of text after which gigatoken, which forgets no word that it has met, starts afresh

AWKWARD = "".join(
    [
        "It's we'll I'd you're they've I'm don't 'S 'LL it’s ''s x'\n\n\n \t\tand  so   on \r\n",
        "1234 12.5% ½ Ⅷ ١٢٣ x1y2 _a_ #!? ... --- $5,000 <|endoftext|> <|endoftext|>",
        "naïve e\u0301 日本語。ไทย नमस्ते \u200d 👩\u200d👩 🙂🙂 \ufeff\u200b\u180e\0\x7f",
        *(f"a{space}b {space}{space}c\n{space} 1" for space in "\t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u2003\u2028\u3000"),
        "antidisestablishmentarianism" * 9 + "!" * 70 + "\n" * 40 + " " * 80 + "end's \n  ",
    ]
)

# gigatoken goes by Unicode 17 and tiktoken by an earlier version, which knows some 4,700 letters and digits less: the
# first bytes of these (and of some neighbours) in UTF-8, by the very first, which few texts have.
_UNICODE_17 = {
    b"\xe0": ("\u088f".encode(), "\u0c5c".encode(), "\u0cdc".encode()),
    b"\xea": ("\ua7ce".encode()[:2],),
    b"\xf0": tuple(bytes([0xF0, second]) for second in b"\x90\x91\x96\x98\x9e\xab\xac\xb2\xb3"),
}


class QuickEncoder:
    """Ordinary text to GPT-2's token ids by gigatoken, exactly as the tiktoken `encoding` gives them.

    Text that spells out <|endoftext|> is text. It works in the calling thread alone, so that many processes may each
    have one. Raises whatever a gigatoken raises that is missing or broken.
    """

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        ranked = (b64encode(encoding.decode_single_token_bytes(i)) for i in range(encoding.eot_token))
        self._ranks = b"".join(b"%b %d\n" % (token, rank) for rank, token in enumerate(ranked))
        self._start_afresh()

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids of a text in UTF-8, (n,) uint16."""
        if may_differ(text):
            return self._encoding.encode_to_numpy(text.decode(), disallowed_special=()).astype(np.uint16)
        if self._met > REMEMBERED:
            self._start_afresh()
        self._met += len(text)
        return self._backend.encode(text).astype(np.uint16)

    def _start_afresh(self) -> None:
        import gigatoken

        with tempfile.TemporaryDirectory() as folder:  # it reads ranks from a file only
            path = Path(folder) / "ranks"
            path.write_bytes(self._ranks)
            self._backend = gigatoken.Tokenizer.from_tiktoken(path, pretokenizer="gpt2", special_tokens={})
        self._met = 0


def may_differ(text: bytes) -> bool:
    """Whether a text in UTF-8 has a character that gigatoken takes for a letter or digit and tiktoken perhaps not."""
    return any(first in text and any(start in text for start in starts) for first, starts in _UNICODE_17.items())


@functools.cache
def quick_encoder(encoding: Any) -> QuickEncoder | None:
    """This process's encoder for a tiktoken `encoding`; None where gigatoken is not installed.

    None also where it cannot be used or says something else than tiktoken, of which the main process warns.
    """
    try:
        encoder = QuickEncoder(encoding)
        alike = encoder.encode(AWKWARD.encode()).tolist() == encoding.encode_ordinary(AWKWARD)
        wrong = "" if alike else "it makes other tokens"
    except Exception as error:  # a beta's interface may change; tiktoken does the same work
        if isinstance(error, ModuleNotFoundError) and error.name == "gigatoken":
            return None
        wrong = f"{type(error).__name__}: {error}"
    if not wrong:
        return encoder
    if parent_process() is None:
        warn(f"GPT-2's tokens are made by tiktoken, which is slower: gigatoken cannot be used ({wrong})")
    return None
