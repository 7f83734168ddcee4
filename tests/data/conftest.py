"""GPT-2's vocabulary, for the tests of what is made with it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from data.tokenizers import Gpt2Tokenizer


@pytest.fixture(scope="session")
def gpt2(shared: Path) -> Iterator[Gpt2Tokenizer]:
    """GPT-2's tokenizer, its vocabulary from ../shared, where processes of the tests find it too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "data" / "gpt2-bpe"))
        yield Gpt2Tokenizer()
