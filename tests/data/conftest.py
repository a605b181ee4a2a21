import json

import pytest
from byte_tokenizer import MERGES, byte_tokenizer


@pytest.fixture
def tokenizer():
    """One token per byte: its ids can be decoded by eye, and tokenising apart or together is the same."""
    return byte_tokenizer()


@pytest.fixture
def merging_tokenizer():
    """Tokenising apart or together differs."""
    return byte_tokenizer(MERGES, bos_token="<|head|>")


@pytest.fixture(scope="session")
def shared_tokenizer():
    """One for tests that try many inputs; do not change it."""
    return byte_tokenizer()


@pytest.fixture
def write_rows(tmp_path):
    """`write_rows(*rows, name="rows.jsonl")` -> the path as text."""

    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
