import pytest
from helpers import on_threads
from lm_cases import TINY, write_text


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt")


@pytest.fixture
def corpus(text):
    from lm.data import load_corpus

    return load_corpus([str(text)], max_bytes=1_000_000, seq_len=TINY.seq_len)


@pytest.fixture(autouse=True)
def one_thread():
    """Steps this small gain nothing from a second thread, and lose much to it where the cores are busy."""
    with on_threads(1):
        yield
