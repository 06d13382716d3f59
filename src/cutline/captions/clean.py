"""Cleaning of generated text: what a model or a server answers → one line of plain text, or why there is none.

`clean` is for answers of models: it takes away what chat models put around a caption (reasoning, "Sure, here is the
caption:", quotes round the whole, markdown), and tells refusals and loops from captions. `tidy` is for text that people
wrote: it takes away only what no text should hold (control characters, HTML), and keeps the words. Both cut what is too
long for a text tower.

They are pure functions which never raise, and which leave their own results as they are: `clean(clean(x)) == clean(x)`.
"""

import html
import json
import re
from collections.abc import Callable
from functools import cache

from cutline.captions.work import Failed
from cutline.towers.words import WordTokenizer

CONTEXT = 77  # tokens of CLIP's text towers, start and end included
MAX_CHARACTERS = 20_000  # looked at: the rest of an answer that does not end is worth no time
MAX_WORD = 200  # characters: no word is longer, and byte pairs of a long one take quadratic time
PASSES = 50  # markup within markup is taken away from the outside in; what is nested deeper is no caption

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
# Soft hyphens, marks of direction, zero-width spaces, tags; halves of surrogates and private characters. The joiners
# U+200C and U+200D stay: scripts of India, and emoji, are made with them.
_INVISIBLE = re.compile(
    "[\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff0-\uffff\ud800-\udfff\ue000-\uf8ff"
    "\U000e0000-\U000e007f\U000f0000-\U0010ffff]"
)
_SPECIAL = re.compile(r"<\|[\w ./-]{1,60}\|>|\[/?(?:INST|SYS)\]|<<?/?SYS>>")  # tokens of chat templates
# With tags, or in channels as of gpt-oss; decoders that skip special tokens leave the bare words of those.
_REASONING = re.compile(
    r"\A.*<\|channel\|>final<\|message\|>|<\|channel\|>\w{1,20}<\|message\|>.*?(?:<\|end\|>|\Z)"
    r"|\Aanalysis.*assistantfinal|<(think|thinking|reasoning)>.*?(?:</\1>|\Z)|\A.*</think(?:ing)?>",
    re.DOTALL,
)
_HIDDEN = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_BREAK = re.compile(r"</?(?:br|p|div|li|ul|ol|td|th|tr|table|h[1-6])\b[^<>]{0,1000}>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,1000}>")
_MARKDOWN = [
    (re.compile(r"`{3,}[\w+-]*\n|`{3,}|~{3,}[\w+-]*\n|~{3,}"), " "),
    (re.compile(r"`([^`\n]+)`"), r"\1"),
    (re.compile(r"!?\[([^\[\]\n]*)\]\([^()\s]*(?: \"[^\"\n]*\")?\)"), r"\1"),
    # Within a word it is no markup: M*A*S*H.
    (re.compile(r"(?<![A-Za-z0-9*])(\*{1,3})(?=[^\s*])([^*\n]{1,2000}?)(?<=[^\s*])\1(?![A-Za-z0-9*])"), r"\2"),
    (re.compile(r"(?<!\w)(_{1,3})(?=[^\s_])([^\n]{1,2000}?)(?<=[^\s_])\1(?!\w)"), r"\2"),
    (re.compile(r"^[ \t]*(?:[-*_] ?){3,}$", re.MULTILINE), " "),
    (re.compile(r"^[ \t]*(?:#{1,6}\s+|>+\s+|[-*+•]\s+|\d{1,2}[.)]\s+)+", re.MULTILINE), ""),
]
_MARKED = re.compile(r"[`~*_\[\n]|\A[-+#>•\d]")  # what any of these need
# Several answers where one was asked for: "1. ... 2. ..." or "Option 1: ... Option 2: ...".
_ITEM = r"(?:(?:option|caption|version|sentence|description|alternative)s? )"
_FIRST = re.compile(rf"^[>*_# ]{{0,8}}(?:{_ITEM}1 ?[.):]|1[.)])[*_]{{0,3}}\s", re.IGNORECASE | re.MULTILINE)
_SECOND = re.compile(rf"(?:\n|(?<=[.!?\"”’]) )[>*_# ]{{0,8}}(?:{_ITEM}2 ?[.):]|2[.)])[*_]{{0,3}}\s", re.IGNORECASE)
_NOUN = r"(?:captions?|descriptions?|sentences?|outputs?|answers?|results?|responses?|rewrites?|rephrasings?|options?)"
_MADE = (
    r"(?:final|fused|merged|combined|revised|improved|rewritten|rephrased|refined|alt(?:ernative)?|suggested|generated"
    r"|enhanced)"
)
_KIND = rf"(?:my|the|an?|one|new|{_MADE}|short|concise|brief|possible|image|photo|picture|detailed|single)"
_PICTURE = r"(?:image|picture|photo)"
# "The text reads: STOP" and "Version 2: the new car" are captions; "Rephrased text: ..." is none.
_PREAMBLE = re.compile(
    r"\A\s*(?:"
    r"(?:sure(?: thing)?|certainly|of course|absolutely|understood|got it|no problem)\s*[!,.:]+\s+"
    r"|(?:(?:okay|ok|great|yes|alright|all right)[!,.]?\s+)?"
    r"(?:(?:here(?:['’]s| is| are)|th(?:is|e following) is|below is|based on)\b"
    rf"[^\n:.!?]{{0,80}}\b(?:{_NOUN}|rewritten|rephrased|summary|(?:texts?|versions?)(?=\s*:))\b[^\n:.!?]{{0,80}}:"
    rf"|(?:here(?:['’]s| is)|below is)\b[^\n:.!?]{{0,80}}\b{_NOUN}[^\n:.!?]{{0,30}}\n"
    r"|here(?:['’]s (?:one|it|mine)| you go| it is| you are)\s*[:!.]"
    r"|i(?:['’]d| would|['’]ve| have)? (?:describe|caption|rephrased?|re(?:write|wrote|written)|combined?|merged?)\b"
    r"[^\n:.!?]{0,80}:)"
    rf"|(?:{_KIND}\s+){{0,5}}(?:{_NOUN}|rewritten|rephrased|{_MADE} (?:texts?|versions?))(?:\s+\d{{1,2}})?"
    rf"(?:\s+(?:is|could be|would be|as(?: follows)?|for (?:the|this) \w+|of (?:the|this) {_PICTURE}))*\s*[:\n]"
    r"|(?:assistant|model|bot|ai)\s*[:\n]"
    r")+\s*",
    re.IGNORECASE,
)
# A new line is needed before what might as well be said of a picture ("This text is written in red.").
_AFTERWORD = re.compile(
    r"(?:(?:(?<=[.!?\"”’])\s|\n)\(?(?:(?:please )?let me know (?:if|how|whether|which|what)"
    r"|i hope (?:this|that|it) (?:helps|works|meets|is (?:helpful|what))|feel free to|would you like me|do you want me"
    r"|is there anything else|i(?:['’]ve| have) (?:kept|rewritten|combined|merged|removed|used|rephrased)"
    r"|if you(?:['’]d like| would like| (?:need|want) (?:me|any|more|further|a)\b))"
    r"|\n\(?(?:would you like|if you(?:['’]d| would| need| want)|please let me know|i hope (?:this|that|it)"
    r"|note(?: that|:)|explanation:|(?:word|character) count"
    rf"|alternatively\b|(?:key )?changes(?: made)?:|this (?:{_NOUN}|text|version) "
    r"|this (?:combines|merges|fuses|keeps|preserves|retains|captures|incorporates|integrates)\b)"
    # Base models go on with the next turn, or with the next example of the prompt.
    r"|\n(?:user|human|caption|sentence|rewritten|(?:raw|alt) text[^\n:]{0,40}) ?:"
    r"|\s[\[(]\d{1,3} (?:words|characters|tokens)[\])]\Z).*\Z",
    re.IGNORECASE | re.DOTALL,
)
# Quotes round the whole may hold quotes, which open after a space: not so `"Stop" and "Go"`.
_QUOTED = re.compile(
    r"\A(?:\"([^\"]*(?:(?<=[\s(\[{])\"[^\"]*\"[^\"]*)*)\"|“([^“”]*)”|«([^«»]*)»|„([^„“”]*)[“”]|'([^']*)'|‘([^‘]*)’|`([^`]*)`)"
    r"([.!?,;]?)\Z"
)
_RUN = re.compile(r"([^\w\s])\1{3,}")  # of one mark: "....."
_ABSENT = r"(?:provided|given|attached|available)\b"
_GIVEN = r"(?:image|picture|photo|caption|text|sentence)s?"  # what a model is asked about
_REFUSED = re.compile(
    r"\A(?:(?:i['’]?m|i am|we are|we['’]re) (?:(?:very |so |truly |really )?(?:sorry|unable|not able|afraid(?! of)"
    r"|not capable)\b|(?:just |only )?an? (?:[\w-]+ ){0,2}(?:ai|artificial intelligence|language model)\b)"
    r"|(?:i )?apologi[sz]e\b|my apologies(?:[.!]|,? (?:but|for|i)\b)"
    r"|sorry,? (?:but )?(?:i\b|as an\b|there is no|your (?:image|message|request|input)\b)"
    rf"|unfortunately,? (?:(?:i|we)\b|(?:there is )?no {_GIVEN}\b)"
    r"|i (?:can ?not|can['’]t|could ?n['’]?o?t|do ?n['’]t|do not|won['’]t|will not) (?:(?:view|describe|help|assist"
    r"|provide|create|generate|fulfil?l|identify|process|access|determine|comply|answer|do|make|write|analy[sz]e"
    r"|actually|directly|engage|rewrite|rephrase|combine)\b"
    rf"|see (?:\w+ ){{0,2}}{_PICTURE}s?\b"
    rf"|have (?:\w+ ){{0,2}}(?:access|abilit(?:y|ies)|capabilit(?:y|ies)|{_PICTURE}s?|information|context|eyes)\b)"
    rf"|there (?:is|was) no {_GIVEN} (?:{_ABSENT}|here\b|to (?:describe|caption|rewrite|rephrase|combine|merge|work with))"
    rf"|no {_GIVEN} (?:(?:is|was|were|has been) )?{_ABSENT}"
    rf"|(?:unfortunately,? )?the {_GIVEN} (?:(?:is|was|were) ?n(?:o|['’])t|ha(?:s|ve) ?n(?:o|['’])t been) {_ABSENT}"
    r"|(?:please|(?:could|can|would) you(?: please| kindly)?) (?:provide|upload|share|attach|give)\b[^.!?]{0,60}\b"
    rf"(?:{_GIVEN}|description|context|information|details|link|url)\b"
    rf"|(?:it (?:seems|appears|looks like)|i (?:see|notice|think))(?: that)? (?:there is )?no {_GIVEN}\b"
    r"|it (?:seems|appears|looks like)(?: that)? you(?:['’]ve| have| did| forgot)"
    r"|(?:i (?:see|notice|think)(?: that)? )?you (?:have ?n['’]t|have not|did ?n['’]t|did not)"
    r" (?:provided?|upload(?:ed)?|attach(?:ed)?|given?(?! up)|included?)\b"
    r"|it(?:['’]s| is) (?:not possible|impossible) to (?:rephrase|rewrite|combine|merge|describe|caption|generate"
    r"|create|provide|write)\b)"
    r"|\bas an? (?:(?:[\w-]+ ){0,3}(?:ai|artificial intelligence|language model)(?: [\w-]+){0,3}"
    r"|(?:helpful|virtual) assistant),? (?:i|we|my)\b",
    re.IGNORECASE,
)
_NOTHING = frozenset(("n/a", "na", "none", "null", "nan", "nil", "empty", "unknown", "no caption", "no description"))
_STUTTER = re.compile(r"(?!0{10,29}(?!0))(\S{1,8}?)\1{9,}")  # the zeros of a number are none
_SENTENCE_END = re.compile(
    r"(?<!\b\w)(?<!\bMr)(?<!\bMrs)(?<!\bMs)(?<!\bDr)(?<!\bSt)(?<!\bvs)(?<!\bNo)[.!?。！？]+[\"”’)\]]*(?=\s|$)"
)


def clean(text: str, limit: int = CONTEXT) -> str | Failed:
    """The caption in a model's answer, at most `limit` tokens of CLIP's tokeniser (start and end included).

    `Failed` with the reason "empty", "refused", "repeats itself" or "markup" (nested without end) where there is none.
    """
    cleaned = _settle(text, lambda t: _unquoted(_one_line(_without_talk(_plain(t)))), limit)
    if isinstance(cleaned, Failed):
        return cleaned
    if cleaned.lower().strip(" .!()[]{}") in _NOTHING:
        return Failed("empty")
    if _REFUSED.search(cleaned):
        return Failed("refused")
    return Failed("repeats itself") if repeats_itself(cleaned) else cleaned


def tidy(text: str, limit: int = CONTEXT) -> str | Failed:
    """What people wrote, as one line of at most `limit` tokens; `Failed` ("empty" or "markup") where nothing is left."""
    return _settle(text, lambda t: _one_line(_plain(t)), limit)


def _settle(text: str, step: Callable[[str], str], limit: int) -> str | Failed:
    """`step` again and again, since what it takes away may uncover more; cut when, and until, it changes nothing."""
    text = text[:MAX_CHARACTERS]
    for _ in range(PASSES):
        before, text = text, step(text)
        if text == before:
            text = _cut(text, limit)
            if text == before:
                return text if any(c.isalnum() for c in text) else Failed("empty")
    return Failed("markup")


def _plain(text: str) -> str:
    """Without HTML, tokens of chat templates, and characters that are not seen; lines stay."""
    if "&" in text:
        text = html.unescape(re.sub(r"&(?:amp;)+", "&", text))
    text = _INVISIBLE.sub("", _CONTROL.sub(" ", text))
    if "<" in text or "[" in text or "assistantfinal" in text:
        text = _HIDDEN.sub(" ", _SPECIAL.sub(" ", _REASONING.sub(" ", text)))
        text = _TAG.sub("", _BREAK.sub("\n", text))
    return text


def _without_talk(text: str) -> str:
    """Without markdown and JSON, and without what chat models say before and after an answer; of several, the first."""
    text = _squeezed(text)
    if (first := _FIRST.search(text)) and (second := _SECOND.search(text, first.end())):
        text = text[: first.start()] + text[first.end() : second.start()]
    if _MARKED.search(text):
        for pattern, by in _MARKDOWN:
            text = pattern.sub(by, text)
        text = _squeezed(text)
    if (value := _of_json(text)) is not None:
        return value
    return _AFTERWORD.sub("", _PREAMBLE.sub("", text))


def _squeezed(text: str) -> str:
    """Lines without spaces around and empty lines between: patterns take quadratic time for runs of them."""
    return "\n".join(line for line in (" ".join(line.split()) for line in text.splitlines()) if line)


def _of_json(text: str) -> str | None:
    """The text of a JSON object that holds a single one."""
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        texts = [value for value in json.loads(text).values() if isinstance(value, str)]
    except (ValueError, RecursionError):
        return None
    return texts[0] if len(texts) == 1 else None


def _one_line(text: str) -> str:
    return " ".join(_RUN.sub(r"\1\1\1", text).split())


def _unquoted(text: str) -> str:
    """Without quotes round the whole, and without one that has lost its other half."""
    if whole := _QUOTED.match(text):
        return "".join(part or "" for part in whole.groups()).strip()
    if text.count('"') == 1 and (text[0] == '"' or (text[-1] == '"' and not text[-2].isdigit())):  # 55" are inches
        return text.strip('"').strip()
    return text


def repeats_itself(text: str) -> bool:
    """Whether the text loops, as captioners do that find no end.

    A word or two four times in a row; a phrase of 3 to 20 words three times in a row; characters ten times in a row; or
    at least 20 words of which less than a quarter differ.
    """
    words = re.findall(r"\w+", text.casefold())
    for period in range(1, min(20, (len(words) + 1) // 3) + 1):
        # The third time a long phrase may lack its last word ("and").
        needed, run = (3 * period if period <= 2 else 2 * period - (period > 4)), 0
        for word, later in zip(words, words[period:]):
            run = run + 1 if word == later else 0
            if run >= needed:
                return True
    return (len(words) >= 20 and len(set(words)) < len(words) / 4) or _STUTTER.search(text) is not None


@cache
def _tokenizer() -> WordTokenizer:
    return WordTokenizer()


def count_tokens(text: str) -> int:
    """Tokens of CLIP's tokeniser, start and end included, before anything is cut."""
    return len(_tokenizer().encode(text)) + 2


def _cut(text: str, limit: int) -> str:
    """The longest beginning of whole sentences that fits into `limit` tokens, or else of whole words."""
    words = [word[:MAX_WORD] for word in text.split(" ")]
    text = " ".join(words)
    if count_tokens(text) <= limit:
        return text
    fitting = _most(len(words), lambda n: count_tokens(" ".join(words[:n])) <= limit)
    if not fitting:
        word = words[0]
        return word[: _most(len(word), lambda n: count_tokens(word[:n]) <= limit)]
    start = " ".join(words[:fitting])
    ends = [m.end() for m in _SENTENCE_END.finditer(start) if start.count(" ", 0, m.end()) >= 2]
    return start[: ends[-1]] if ends else start.rstrip(" ,;:-–—(&/")


def _most(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n ≤ `most` that fits, by bisection; what fits at n fits below, but for rare merges of characters."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    while low and not fits(low):
        low -= 1
    return low
