import hashlib

import pytest

from megamoe.data.samples import ENWIK8_HEAD, read_sample
from megamoe.data.text8 import clean_wikipedia


def page(text: str) -> bytes:
    return f'<page>\n <title>No</title>\n <text xml:space="preserve">{text}</text>\n</page>\n'.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The ''Big'' (2) dogs!", " the big two dogs"),
        ("born 1984", " born one nine eight four"),
        ("see [[Link|the label]] and [[plain]]", " see the label and plain"),
        ("[http://x.org a site]", " a site"),
        ("[[Image:cat.jpg|thumb|left|120px|A cat]]", " a cat"),
        ("[[Category:Cats|*]] [[de:Katze]]", " cats"),
        ("{{stub}} {| table |} x", " x"),
        ("&lt;b&gt;bold&lt;/b&gt; A&amp;amp;B &amp;nbsp;c", " bold a b c"),
        ("a &lt;ref name=x&gt;source&lt;/ref&gt; b", " a b"),
        ("caf\u00e9", " caf"),
    ],
)
def test_rules(text: str, expected: str) -> None:
    assert clean_wikipedia(page(text)) == expected.encode()


def test_pages_follow_each_other_and_redirects_vanish() -> None:
    dump = page("One") + page("#REDIRECT [[Two]]") + page("") + page("three")
    assert clean_wikipedia(dump) == b" one three"


def test_enwik8_head_becomes_the_beginning_of_text8() -> None:
    """The hash is that of the original filter's output; the true text8 starts with these words."""
    text = clean_wikipedia(read_sample(ENWIK8_HEAD))
    assert text.startswith(b" anarchism originated as a term of abuse first used against early working class")
    assert len(text) == 3_008_641
    assert (
        hashlib.sha256(text).hexdigest() == "7a531796f8335b938827f997234b3dbd0b45c2a3aed44e9021616ab482e37ffb"
    )
