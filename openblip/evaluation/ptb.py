"""Penn-Treebank tokens of captions, as the caption metrics of COCO expect them.

coco-caption counts words after the English PTB tokenizer of Stanford CoreNLP 3.4.1 (Java) with
lower-casing, and drops some punctuation tokens. This module gives the same words without Java. It
was written from the observed answers of that program, not from its source: every character of the
basic plane and every word of up to four letters was put to it.

As in the original, brackets survive as `-lrb-` and the like: coco-caption removes only their
upper-case names. The second full stop that the Java program adds after an abbreviation at the end
of a sentence is not made: punctuation reaches no score.

One difference can: the Java program reads all captions as one text, so whether a single letter at
the end of a caption ("plan B.") keeps its stop depends there on how the next caption begins. Here
it never does, which is what most captions ("A man ...") make of the one before.
"""

import re
from functools import lru_cache

# coco-caption's list, of which the upper-case names never occur.
_QUOTES_AND_BRACKETS = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-"))
PUNCTUATION = _QUOTES_AND_BRACKETS | frozenset(".?!,:-;") | {"--", "..."}

_WITH_STOP = """
adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bancorp bhd bldg blvd brig bros calif
capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc
ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd
maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla
penn pfc ph ph.d plc ppte ppty pres prof profs pte ptes pty ptys pvt rd rep reps rev rt sen sens sep
sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis
wisc wm wyo
"""
_ABBREVIATIONS = frozenset(_WITH_STOP.split())
# The full stop stays if the word has a capital, or if a number follows ("no. 5", "fig. 2").
_CAPITAL_ABBREVIATIONS = frozenset(
    ("ark", "az", "del", "ill", "la", "mass", "miss", "ore", "pa", "tex", "wash")
)
_NUMBERED = frozenset(("art", "ca", "fig", "figs", "no", "nos", "op", "pp", "prop"))

# A single letter gives its full stop to the sentence if the next word is one of these, capitalised.
_STARTS = """
a about according additionally after an as at but earlier he her here however if in it last many
more now once one other our she since so some such that the their then there these they this we
what when while yet you
"""
_SENTENCE_STARTS = "|".join(f"{word[0].upper()}(?i:{word[1:]})" for word in _STARTS.split())

_SPLIT_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
    "wanna": ("wan", "na"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DOUBLE_QUOTES = {"\u201c\u00ab\x93": "``", "\u201d\u00bb\x94": "''"}
_SINGLE_QUOTES = {"\u2018\u201b\u2039\x91": "`", "\u2019\u203a\x92": "'"}
_CURRENCIES = {"\u20ac\u20a0\u00a4\x80": "$", "\u00a3": "#", "\u00a2": "cents"}
_FRACTIONS = {"\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3"}
_DASHES = {"\u2013\u2014\u2015\x96\x97": "--", "\u2026": "..."}
_SIGNS = {
    sign: name
    for group in (_BRACKETS, _DOUBLE_QUOTES, _SINGLE_QUOTES, _CURRENCIES, _FRACTIONS, _DASHES)
    for signs, name in group.items()
    for sign in signs
}
_ENTITIES = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&apos;": "'",
    "&quot;": '"',
    "&mdash;": "--",
    "&ndash;": "--",
}
_NBSP = "\u00a0"  # joins the parts of a token that holds spaces, as in "1 1/2"

# Digits of the word class that are symbols (raised, in circles, fractions) stand alone.
_LETTER = (
    r"[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070\u2074-\u2079\u2080-\u2089\u2150-\u218f"
    r"\u2460-\u24ff\u2776-\u2793]"
    r"|[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u064b-\u065e\u0670\u06d6-\u06dc"
    r"\u0901-\u0963\u0981-\u0df3\u0e31-\u0e4e\u0eb1-\u0ecd]"
    r"|(?i:&[aeioun](?:acute|grave|uml|circ|tilde);)"
)
# The symbols that are a token; whatever is in no rule at all (emoji, CJK brackets) is dropped.
_SYMBOL = (
    r"[#$%&*+,:;<=>\\^|~/@.?!_\u00a1\u00a5-\u00a9\u00ac\u00ae-\u00b4\u00b6-\u00b9\u00bf\u00d7\u00f7"
    r"\u037e\u0387\u0589\u05be\u05c0\u05c3\u05f3\u05f4\u0606-\u060c\u061b\u061e\u061f\u066a\u066d"
    r"\u06d4\u0964\u0965\u0e3f\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042"
    r"\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a4\u2100-\u2109\u2114-\u2118\u211e-\u2129\u212e"
    r"\u213a-\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20"
    r"\uff3b-\uff40\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6]"
)
_L = f"(?:{_LETTER})"
_A = f"(?:{_LETTER}|\\d)"
_Q = "['\u2019\x92]"
_ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+(?:\.|(?![A-Za-z0-9.]))"
_PART = f"(?:{_ACRONYM}|{_A}+)"
_SLASHED = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_EXTENSION = "(?i:bmp|docx?|exe|gif|html?|jpe?g|mov|mp3|pdf|php|png|ppt|py|txt|x|xml|zip)"
_SUFFIX = f"(?i:s|m|d|re|ve|ll)(?!{_A})"
# What may stand in a web address, and what may end it.
_ADDRESS = r"[^\s\"<>|(){}]"
_ADDRESS_END = r"[^\s\"<>|(){}.,;:!?'-]"
_ATTRIBUTE = r"[\w:.-]+(?: *= *(?:\"[^\"<>]*\"|'[^'<>]*'))?"

# All rules are tried at a place and the longest match wins, as in a generated lexer.
_RULES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"<(?:[!?][A-Za-z-][^<>\n]*|/?[A-Za-z][\w:.-]*(?: +{_ATTRIBUTE})* */?)>",
        rf"https?://{_ADDRESS}*{_ADDRESS_END}",
        rf"(?:[A-Za-z0-9]+\.)+(?:com|net|org|edu)(?:/{_ADDRESS}*[\w/])?(?!{_A})",
        r"<?[A-Za-z0-9][\w.+-]*@[A-Za-z0-9][\w-]*(?:\.[\w-]+)*>?",
        rf"@[A-Za-z_]\w*|\#{_L}+",
        r"(?i:&(?:amp|lt|gt|apos|quot|mdash|ndash|\#\d+);)",
        rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*",
        rf"{_PART}(?:[-_\u2010\u2011]{_PART})*",
        r"[A-Za-z0-9]+(?:[.,][A-Za-z0-9]+)*[.,]?(?:-[A-Za-z0-9]+)+",
        rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}",
        rf"[A-Za-z0-9]+(?:\.[A-Za-z0-9]+)*\.{_EXTENSION}(?!{_A})",
        _ACRONYM,
        rf"[A-Za-z]\.(?!\s*$|\s+(?:{_SENTENCE_STARTS})(?![A-Za-z]))",
        rf"{_A}+\.(?=[,;:])",
        # Letters around an apostrophe: De'Andre, O'Brien, d'or, o'clock, rock 'n' roll, '90s.
        rf"(?:{_L}+[aeiouyAEIOUY]|[oO]){_Q}(?!{_SUFFIX})[aeiouA-Z]{_L}*",
        rf"[A-HJ-XZn]{_Q}(?!{_SUFFIX}){_L}{{2,}}|[dDlL]{_Q}(?!{_SUFFIX}){_L}+",
        rf"(?i:o{_Q}clock|[oe]{_Q}er|s{_Q}mores|c{_Q}mon|nat{_Q}l|[dljy]{_Q}|ol{_Q}|somethin{_Q})",
        rf"(?i:{_Q}(?:em|cause|till?|n{_Q}?)(?!{_A}))|{_Q}\d0s|{_Q}\d\d(?=\s|$)",
        rf"{_Q}{_SUFFIX}|(?i:n(?:{_Q}|`)t)(?!{_A})",
        # Numbers, fractions ("1 1/2" is one token), telephone numbers.
        r"[+-]?(?:\d*(?:[.:,]\d+)+|\d+)",
        rf"[+-]?(?:\d{{1,4}}[- {_NBSP}])?\d{{1,4}}/\d{{1,4}}|\d+ ?[\u00bc-\u00be\u2153\u2154]",
        rf"(?:\(\d{{2,3}}\)[ {_NBSP}]?|\+{{0,2}}(?:\d{{2,4}}[- {_NBSP}])?\d{{2,4}}[- {_NBSP}])"
        rf"\d{{3,4}}[- {_NBSP}]?\d{{3,5}}",
        # Faces, then signs.
        r"[<>]?[:;=][-o*']?[()DPdp\\{@|\[\]](?![A-Za-z])",
        r"[\^x=~<>'-]_[\^x=~<>'-]|\([\^x=~<>'-][_.-]?[\^x=~<>'-]\)",
        r"[A-Za-z]\+\+|[CcFf]\#|[A-Z]{1,3}\$|[A-Z]+(?:[+&]|&amp;)[A-Z]+",
        r"--+|[\u2013-\u2015\x96\x97]+|\.\.\.+|\.(?: \.){2,}",
        r"[?!]+|\*+|__+|\#\#+|@@+|<<|>>|''|``|['\"`-]",
        f"[{re.escape(''.join(_SIGNS))}]|{_SYMBOL}",
    )
)
_ABBREVIATION = re.compile(rf"(ph\.d|[a-z]{{2,}})\.(?!{_L})", re.IGNORECASE)
_SPLIT = re.compile(rf"(?:{'|'.join(_SPLIT_WORDS)})(?![\w'\u2019-])", re.IGNORECASE)
_NOT = re.compile(rf"({_A}+?)n({_Q}|`)(t{_A}*)", re.IGNORECASE)
_NUMBER_FOLLOWS = re.compile(r"\s*\d")
_OPENS_DOUBLE = re.compile(r"[A-Za-z0-9$]")
_OPENS_SINGLE = re.compile(r"[A-Za-z]\S")
_DASH_RUN = re.compile(r"-{2,4}|[\u2013-\u2015\x96\x97]+")
_SUFFIX_TOKEN = re.compile(f"{_Q}{_SUFFIX}")
_FRACTION = re.compile(r"[\u00bc-\u00be\u2153\u2154]")
_OUTSIDE_PLANE = re.compile("[\U00010000-\U0010ffff]")
# Tags, fractions, telephone numbers and spaced dots reach over spaces; "no." and "B." look beyond.
_REACHES_OVER_SPACE = re.compile(r"\d|<|\. \.|\b[A-Za-z]\.\s")


def tokenize(text: str) -> list[str]:
    """Split a text into lower-cased PTB tokens, punctuation included.

    Returns tokens in order; a token of several parts ("1 1/2") holds no-break spaces.
    Source: edu.stanford.nlp.process.PTBTokenizer 3.4.1 with -preserveLines -lowerCase.
    """
    text = _OUTSIDE_PLANE.sub(" ", text).replace("\u00ad", "").replace("&nbsp;", " ")
    if _REACHES_OVER_SPACE.search(text):
        return list(_lex(text))
    return [token for chunk in text.split() for token in _lex_chunk(chunk)]


def caption_words(text: str) -> list[str]:
    """Split a caption into the words that metrics count: its PTB tokens but punctuation."""
    return [token for token in tokenize(text) if token not in PUNCTUATION]


def _lex(text: str) -> tuple[str, ...]:
    tokens: list[str] = []
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        found, position = _next_tokens(text, position)
        tokens.extend(found)
    return tuple(token.lower() for token in tokens)


# Captions repeat the same words: the rules run once per distinct word.
_lex_chunk = lru_cache(maxsize=1 << 16)(_lex)


def _next_tokens(text: str, start: int) -> tuple[tuple[str, ...], int]:
    """Read the token at `start`, two if the word splits; also return where the next begins."""
    end = start
    for rule in _RULES:
        match = rule.match(text, start)
        if match is not None and match.end() > end:
            end = match.end()
    if (split := _SPLIT.match(text, start)) is not None and split.end() >= end:
        return _SPLIT_WORDS[split[0].lower()], split.end()
    if (negated := _NOT.match(text, start)) is not None and negated.end() > end:
        apostrophe = "`" if negated[2] == "`" else "'"
        return (negated[1], f"n{apostrophe}{negated[3]}"), negated.end()
    if (
        (short := _ABBREVIATION.match(text, start)) is not None
        and short.end() > end
        and _keeps_stop(short)
    ):
        return (short[0],), short.end()
    if end == start:
        return (), start + 1
    return (_normalise(text, start, end),), end


def _keeps_stop(match: re.Match[str]) -> bool:
    word = match[1].lower()
    if word in _CAPITAL_ABBREVIATIONS:
        return match[1][0].isupper()
    if word in _NUMBERED:
        return _NUMBER_FOLLOWS.match(match.string, match.end()) is not None
    return word in _ABBREVIATIONS


def _normalise(text: str, start: int, end: int) -> str:
    token = text[start:end]
    token = _ENTITIES.get(token.lower(), token)
    if token == '"':
        return "``" if _OPENS_DOUBLE.match(text, end) else "''"
    if token == "'":
        return "`" if _OPENS_SINGLE.match(text, end) else "'"
    if token in _SIGNS:
        return _SIGNS[token]
    if _DASH_RUN.fullmatch(token):
        return "--"
    if token.startswith(("..", ". ")):
        return "..."
    if _SUFFIX_TOKEN.fullmatch(token):
        return "'" + token[1:]
    token = _FRACTION.sub(lambda sign: " " + _FRACTIONS[sign[0]], token)
    token = token.replace("  ", " ").replace(" ", _NBSP).replace("&amp;", "&")
    return token if token.startswith("<") else token.replace("(", "-lrb-").replace(")", "-rrb-")
