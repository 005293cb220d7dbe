"""Wikipedia XML to the letters a-z and single spaces, by the rules with which text8 was made.

The rules are Matt Mahoney's public-domain filter of 2006 (http://mattmahoney.net/dc/textdata, appendix
A): keep what a reader of the page sees, lower its letters, spell its digits, and turn everything else
into spaces. Applied to the beginning of enwik8 they give the beginning of text8.
"""

import re

_END_TAG = re.compile(rb"<.*>")
# Order matters: each rule sees what the ones before it left.
_RULES: tuple[tuple[re.Pattern[bytes], bytes], ...] = (
    (re.compile(rb"&amp;"), b"&"),
    (re.compile(rb"&lt;"), b"<"),
    (re.compile(rb"&gt;"), b">"),
    (re.compile(rb"<ref[^<]*</ref>"), b""),
    (re.compile(rb"<[^>]*>"), b""),
    (re.compile(rb"\[http:[^] ]*"), b"["),  # an address goes, its label stays
    (re.compile(rb"\|thumb", re.I), b""),
    (re.compile(rb"\|left", re.I), b""),
    (re.compile(rb"\|right", re.I), b""),
    (re.compile(rb"\|\d+px", re.I), b""),
    (re.compile(rb"\[\[image:[^\[\]]*\|", re.I), b""),  # an image goes, its caption stays
    (re.compile(rb"\[\[category:([^|\]]*)[^]]*\]\]", re.I), rb"[[\1]]"),
    (re.compile(rb"\[\[[a-z\-]*:[^\]]*\]\]"), b""),  # links to the page in other languages
    (re.compile(rb"\[\[[^|\]]*\|"), b"[["),  # the target of a link goes, its label stays
    (re.compile(rb"\{\{[^}]*\}\}"), b""),
    (re.compile(rb"\{[^}]*\}"), b""),
    (re.compile(rb"[\[\]]"), b""),
    (re.compile(rb"&[^;]*;"), b" "),
)
_DIGITS = (b"zero", b"one", b"two", b"three", b"four", b"five", b"six", b"seven", b"eight", b"nine")
_DIGIT = re.compile(rb"[0-9]")
_NOT_LETTERS = re.compile(rb"[^a-z]+")


def clean_wikipedia(xml: bytes) -> bytes:
    """The visible text of a Wikipedia dump as lower-case letters and single spaces.

    Records end at ``>``. Text is kept from a ``<text`` tag to its end tag; a page that redirects to
    another is left out.
    """
    cleaned = []
    inside = False
    for record in re.findall(rb"[^>]*>|[^>]+\Z", xml):
        if b"<text " in record:
            inside = True
        if b"#redirect" in record.lower():
            inside = False
        if inside:
            inside = b"</text>" not in record
            cleaned.append(_clean_record(record))
    return b"".join(cleaned)


def _clean_record(record: bytes) -> bytes:
    """Words of one record, each after one space."""
    record = _END_TAG.sub(b"", record, count=1)
    for pattern, replacement in _RULES:
        record = pattern.sub(replacement, record)
    spelled = _DIGIT.sub(lambda digit: b" " + _DIGITS[int(digit[0])] + b" ", record.lower())
    return _NOT_LETTERS.sub(b" ", b" " + spelled + b" ")[:-1]
