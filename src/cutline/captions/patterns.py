"""What text from the web looks like: file names, boilerplate, shop talk, addresses, and the words that carry meaning.

Plain expressions and short word lists, shared by the fuser by rules and by the scores. They know the usual English forms
and the commonest German, Spanish and French ones; they are no language model, and do not try to be one.
"""

import re

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
URL = re.compile(
    r"(?:https?://|(?<![\w@.-])www\.)[^\s<>\"']+"
    r"|(?<![\w@.-])(?:[a-z0-9-]{1,63}\.){1,8}(?:com|org|net|edu|gov|info|io|co|eu|de|fr|es|uk|shop)\b(?:/[^\s<>\"']*)?",
    re.IGNORECASE,
)
# With a country's +, with an area in brackets or after a 0, or in the American 3-3-4 form; dates and prices are none.
PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){2,6}"
    r"|(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}"
    r"|\(0\d{1,4}\) ?\d{3,4}[ -]?\d{3,4}"
    r"|0\d{1,4}[ /-]\d{3,4}[ -]?\d{3,5}"
    r")(?![\w-])"
)

STOPWORDS = frozenset(
    """a about above across after again against all along also am among an and another any are around as at away back be
    because been before behind being below beneath beside besides between beyond both but by can could did do does doing
    down during each either else etc ever every few for from get gets getting got had has have having he her here hers
    him his how i if in inside into is it its itself just less let like made make many may me might more most much must
    my near next no nor not now of off on once one only onto or other our ours out outside over own per quite rather s
    same she should since so some something such t than that the their theirs them then there these they this those
    though through to together too toward towards under until up upon us use very via was we were what when where which
    while who whom whose why will with within without would yes yet you your yours""".split()
)
# Words for the picture itself, which say nothing of what it shows.
MEDIA = frozenset(
    """image images photo photos photograph photographs photography picture pictures pic pics thumbnail thumb screenshot
    logo icon banner header footer slide figure fig gallery placeholder avatar background wallpaper jpg jpeg png gif
    webp img file untitled attachment video stock footage illustration view bild bilder foto fotos imagen imagenes
    imágenes abbildung immagine""".split()
)
# Words of German, Spanish and French by which a text is known as not English, where they stand in lower case.
FOREIGN = frozenset(
    """der das dem ein eine einen einem einer und mit vom zum zur für von auf aus bei über unter ist sind schön schöne
    schöner schönes kaufen günstig angebot bestellen versand preis el la los las una uno unos del para en mi tu su bonito
    bonita hermoso venta comprar precio barato oferta envío le les un une des du au aux avec dans pour et est ma belle
    acheter vendre prix pas cher livraison foto fotos imagen imágenes bild bilder""".split()
)
_PERSON = r"(?:the (?:author|artist|photographer|owner|user)|(?!(?:a|an|the|my|our|your)\b)\S+(?: \S+){0,3})"
_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)"
)
_PICTURE = r"(?:photo(?:graph)?|image|picture|pic|foto|illustration|video)s?"
DATE = re.compile(
    rf"\b(?:\d{{1,2}}\.? )?{_MONTH}\.? (?:\d{{1,2}}(?:st|nd|rd|th)?(?:,? (?:19|20)\d\d)?|(?:19|20)\d\d)\b"
    r"|\b(?:19|20)\d\d[-/.]\d{1,2}[-/.]\d{1,2}\b|\b\d{1,2}[-/.]\d{1,2}[-/.](?:19|20)\d\d\b",
    re.IGNORECASE,
)
BOILERPLATE = re.compile(
    "|".join((
        r"\b(?:click|tap|press|hover)(?: here| on)?(?: (?:the )?(?:image|photo|picture|thumbnail))? (?:to|for)"
        r" (?:view |see |get |open |download |play )?(?:an? |the )?(?:enlarge|zoom|expand|larger|large|bigger|full|view"
        r"|see|open|play|download|more|details?|high)\w*(?:[ -](?:in|size|sized|version|resolution|image|photo|picture"
        r"|view|screen|details?))*",
        r"\bclick here\b",
        rf"\b{_PICTURE}(?: (?:is )?(?:credits?|courtesy|source|copyright))(?: of| by)?\s?:?\s?(?:{_PERSON})?",
        # At most four: a run of them without end would be gone through again from each.
        rf"\b(?:(?:{_PICTURE}|taken|posted|uploaded|submitted|written|published|shot) ){{1,4}}by:? {_PERSON}",
        r"\b(?:posted|published|uploaded|updated|added|taken|filed)(?: on| in| at)?(?=\W|$)",
        rf"\b{_PICTURE} may contain\b:?(?: ?(?:indoor|outdoor|text|nature|one or more people)s?\b,?)*",
        rf"\b(?:no|missing) (?:{_PICTURE}|description|caption|alt text|title|preview|thumbnail)"
        r"(?: (?:is )?(?:available|found|provided|yet))?\b",
        r"\b(?:featured|header|hero|cover|default|related|main|thumbnail|profile|preview|banner|sample)"
        rf" (?:{_PICTURE}|background|thumbnail|banner|logo)\b",
        r"\b(?:read|see|view|load|show|learn|find out) (?:more|all|full|larger)\b(?: (?:about|details?)\b)?",
        r"\b(?:share|follow|like|find|pin|tweet)(?: us| this| it)? (?:on|via|to) (?:social media|facebook|twitter|x|"
        r"instagram|pinterest|whatsapp|linkedin|e-?mail)\b",
        r"(?:©|\(c\)|\bcopyright\b|\ball rights reserved\b)(?: ?(?:19|20)\d\d(?:-\d+)?)?",
        r"\b(?:page|slide|figure|fig\.?|image|photo|picture|part|item|no\.?|#) ?\d+(?: ?(?:of|/) ?\d+)?\b",
        r"\b(?:advertisement|sponsored|loading|skip to content|sign (?:in|up)|log ?in|subscribe|newsletter|privacy policy"
        r"|terms of (?:use|service)|(?:accept|use|our) cookies|sharethis|permalink|your browser does not support\b.*"
        r"|play video|source: \S+|via \S+\.\w+)\b",
        r"\b(?:alt(?:ernative)? text|caption|description|title)(?: here)?$",
    )),
    re.IGNORECASE,
)  # fmt: skip
# What each part of BOILERPLATE and URL holds a word of: a text with none of them, and without `_SIGNS`, need not be
# searched, which is slow.
_TRIGGERS = frozenset(
    """click tap press hover credit credits courtesy source copyright by posted published uploaded updated added taken
    filed contain no missing featured header hero cover default related main thumbnail profile preview banner sample read
    see view load show learn find share follow like pin tweet c reserved advertisement sponsored loading skip sign log
    login subscribe newsletter privacy terms cookies sharethis permalink browser play via alt alternative caption
    description title page slide figure fig part item jan january feb february mar march apr april may jun june jul july
    aug august sep sept september oct october nov november dec december http https www com org net edu gov info io co eu de fr es uk shop""".split()
)
_SIGNS = re.compile(r"\d[-/.]|[©@#]")
SHOP = re.compile(
    "|".join((
        r"\bfree (?:shipping|delivery|returns?|gift|uk delivery)\b", r"\b\d+ ?%(?: off)?",
        r"\b(?:buy|order|shop|get)(?: (?:it|yours|now|online|today|here|cheap))*\b(?= |$|\W)",
        r"\b(?:for sale|on sale|sale|clearance|discount(?:ed|s)?|bargains?|deals?|coupons?|promo(?:tion)?|cheap)\b",
        r"\b(?:best|low(?:est)?|great|special|wholesale) (?:prices?|deals?|offers?|sell(?:er|ing))\b", r"\bprices?\b",
        r"(?:[$€£¥]|\b(?:usd|eur|gbp)) ?\d+(?:[.,]\d+)*|\b\d+(?:[.,]\d+)* ?(?:[$€£¥]|(?:usd|eur|gbp)\b)",
        r"\b\d+[.,]\d\d(?!\d)", r"\bin stock\b|\bsold out\b|\bout of stock\b|\bpre-?order\b|\badd to (?:cart|basket|bag)\b",
        r"\bwholesale\b|\bsuppliers?\b|\bmanufacturers?\b|\bretail(?:er)?\b|\bexporters?\b",
        r"\b(?:ships?|dispatched|delivery|delivered)\b(?: (?:in|within) \d+ ?(?:h|hours?|days?|hrs))?",
        r"\bnew arrivals?\b(?: (?:19|20)\d\d)?|\bnew in\b|\bhot sale\b|\btop (?:quality|rated|seller)\b",
        r"\(?\b(?:pack|set|lot|box) of \d+\b\)?", r"\b(?:customer )?(?:reviews?|ratings?)\b", r"\bonline\b",
        r"\bhigh[ -](?:quality|res(?:olution)?)\b|\broyalty[ -]free\b|\bstock (?:photo|image|vector)s?\b|\bhd\b|\b4k\b",
        r"\b(?:kaufen|günstig|angebot|bestellen|versand(?:kostenfrei)?|en venta|comprar|precio|oferta|envío gratis|à vendre"
        r"|acheter|pas cher|livraison gratuite|in vendita)\b",
    )),
    re.IGNORECASE,
)  # fmt: skip
_EXTENSION = r"\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|heic|heif|svg|avif|psd|cr2|nef|raw|pdf|mp4|mov|eps)"
FILENAME = re.compile(
    "|".join((
        rf"[^\s/\\]+(?: [^\s/\\]+){{0,6}}{_EXTENSION}",
        r"_?(?:img|dsc[nf]?|dscf|_?mg|mvi|vid|pxl|gopr|sam|cimg|hpim|dji|pict|imag|scan|mg|fullsizerender)[-_ ]?e?\d{2,}\S*",
        r"p\d{6,}", r"(?:image|photo|picture|pic|thumb|thumbnail|banner|download|untitled|file|capture|slide)[-_]?\d+\S*",
        r"screen ?shot(?:[-_ ]?(?:from|\d)[\d\-_:. ]*(?:at [\d.:]+)?(?: ?[ap]m)?)?",
        r"whatsapp (?:image|video) \d[\d-]*(?: at [\d.:]+(?: [ap]m)?)?",
        r"\d{8}[-_]\d{3,}\S*", r"\d{7,}", r"(?=\S*\d)[0-9a-f]{10,}", r"(?=\S*\d)[\w-]*_[\w-]*",
        r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    )),
    re.IGNORECASE,
)  # fmt: skip
_LETTERS = re.compile(r"[^\W\d_]+")
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # letters of any script, with apostrophes and hyphens inside


def is_filename(text: str) -> bool:
    """Whether the whole text is the name of a file, as cameras, phones and web pages give them."""
    text = text.strip()
    return len(text) < 200 and FILENAME.fullmatch(text) is not None


def is_boilerplate(text: str) -> bool:
    """Whether the text is there, but says nothing of the picture: "click to enlarge", "photo by Anna", "page 3 of 40".

    What is known as boilerplate, dates, addresses and words for the picture itself are taken away; no word may be left.
    """
    # Taking all that away is slow. Nearly every caption has a word near its beginning that no such phrase covers.
    first = next((m for m in WORD.finditer(text) if any(w not in MEDIA for w in content_words(m[0]))), None)
    phrases = (BOILERPLATE, EMAIL, URL, DATE)
    if first and not any(p.match(text, at) for at in range(first.start() + 1) for p in phrases):
        return False
    if not _TRIGGERS.isdisjoint(w.lower() for w in _LETTERS.findall(text)) or _SIGNS.search(text):
        text = without_boilerplate(text) + " |"
    return bool(text.strip()) and all(w in MEDIA for w in content_words(text))


def without_boilerplate(text: str) -> str:
    """The text with boilerplate phrases, dates and addresses replaced by bars, so words at their sides do not join."""
    for pattern in (EMAIL, URL, BOILERPLATE, DATE):
        text = pattern.sub(" | ", text)
    return text


def content_words(text: str) -> list[str]:
    """The words that carry meaning, in lower case and in order; numbers and single ASCII letters are left out."""
    words = (w.lower() for w in WORD.findall(text))
    return [w for w in words if w not in STOPWORDS and not (len(w) == 1 and w.isascii())]
