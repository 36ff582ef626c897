"""A completion -> the one thing it commits to, or that it commits to nothing.

Sentence by sentence: filler, an echo of the question and bare denials are passed over; a correction
or "the answer is" replaces what stood before. In a sentence, side clauses ("London, which beat
Paris") and denials ("not Paris") are set aside. A refusal or a hedge is silence, unless a guess
("I'd say", "probably") follows. English only; rules over words, no model. Knows no gold answer:
whoever looks for one puts a private-use character in its place, in which nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fusion_lens.scores import extract_answer, words
from fusion_lens.values import find_values

MARKS = "\ue000-\uf8ff"


@dataclass(frozen=True, slots=True)
class Claim:
    """`text` is what the completion commits to, empty where it commits to nothing; `aside` what it
    denies or mentions beside; `silence` why it keeps silent, if it does."""

    text: str
    aside: str = ""
    silence: str | None = None


_GAP = rf"[^\w{MARKS}]*"


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE | re.VERBOSE)


_FILLER = _pattern(
    rf"""{_GAP}(?: sure | certainly | of\scourse | well | ok(?:ay)? | hm+ | absolutely
    | unfortunately | honestly | (?:(?:i'm|i\sam)\s)?(?:sorry|afraid)
    | (?:that's\sa\s)?(?:great|good)\squestion | let\sme\s(?:think|see)(?:\sabout\s(?:it|that))?
    | thank(?:s|\syou)\sfor\sasking | (?:the\s|my\s|short\s|final\s)*answer(?:\sis)?
    | here(?:'s|\sis)\s(?:the|my)\sanswer | explanation ){_GAP}"""
)
_YES_NO = _pattern(rf"{_GAP}(?:yes|no){_GAP}")
_CORRECTION = _pattern(
    rf"""{_GAP}(?: (?:no,?\s)?wait | actually,?\s(?:no|it(?:'s|\sis|\swas)) | correction | sorry
    | scratch\sthat | i\smean | or\srather | my\smistake | final\sanswer
    | (?:(?:so|therefore|thus|hence),?\s)?(?:the|my)\s(?:final\s|correct\s|right\s)?answer
        \s(?:is|was) )\b"""
)
_CORRECTED = _pattern(
    r"\b(?: no,?\swait | scratch\sthat | i\smean | or\srather | correction )\b[,:]?"
)
_REFUSAL = _pattern(
    r"""\b(?: (?:i|we)\s(?:\w+\s)?(?:do\snot|did\snot|don't|didn't|keep)\s(?:\w+\s)?
        (?:know|have|recall|remember|forgetting)
    | (?:not|\w+n't)\s(?:\w+\s)?(?:sure|certain|aware|familiar|known|clear|available|possible)
    | (?:cannot|can\snot|can't|could\snot|couldn't|(?:not|\w+n't)\sable\sto|unable\sto)\s(?:\w+\s)?
        (?:answer|say|tell|determine|find|provide|recall|give|remember|confirm|verify|identify|help
        |assist|be\s(?:sure|certain|determined|answered|known|verified))
    | (?:data|records?|sources?|documents?|texts?|passage|context|question|article)\b.{0,30}
        (?:not|n't)\s(?:include|contain|say|state|tell|mention|specify|give|provide)
    | (?:won't|will\snot)\s(?:guess|answer|say) | (?:pure|wild|mere)\sguess
    | unsure | uncertain | unclear | unknown | insufficient | not\senough | as\san\sai
    | no\s(?:\w+\s)?(?:information|idea|clue|records?|data|knowledge|answer|sources?|evidence
        |details?|proof|trace) | lack | mystery | rather\snot
    | (?:hard|difficult|impossible)\sto\s(?:say|tell|know) | need\smore
    | (?:nobody|no\sone|who)\s(?:\w+\s)?(?:knows|can\s(?:say|tell)) | n/a | beats\sme
    | disputed | debated )\b"""
)
_HEDGE = _pattern(
    r"\b(?: maybe | perhaps | possibly | some\ssay"
    r" | (?<!\bi\s)(?<!\bwe\s)(?<!\byou\s)(?:might|may|could)\s(?:\w+\s)?(?:have\sbeen|be)"
    r" | (?:is|are)\spossible | rumou?red | allegedly )\b"
)
_GUESS = _pattern(
    r"\b(?: i(?:'d|\swould|\swill)?\s(?:think|believe|say|guess|suspect) | my\s(?:best\s)?guess\sis"
    r" | probably | (?:most\s)?likely )\b"
)
_ASKING = _pattern(rf"[{MARKS}] | \b(?:(?:can|could|would)\s(?:you|i) | do\syou\smean)\b")
_PART_END = _pattern(
    r",(?!\d|\s\d{3,4}\b) | ; | \( | \) | — | \s[-–]\s | (?<!\bany\w{3})(?<!\bany\w{5})\sbut\b"
)
_SIDE = _pattern(
    rf"""{_GAP}(?: which | who | whose | whom | where | when | after | before | while | whereas
    | though | although | because | since | as | unlike | contrary | despite | regarding
    | concerning | followed | succeeding | beating )\b"""
)
_CLAUSE_END = _pattern(r"\s(?:and|while|whereas)\s")
# a clause that begins with one commands: "Don't Look"
_DENIED_VERB = _pattern(
    rf"""\b(?:is|was|are|were|do|does|did|has|have|had|can|could|would|will)\snot\b
    | (?<=[\w{MARKS}]\s)(?:\w+n't|never|cannot)\b"""
)
_DENIED = _pattern(
    r"\b(?: not | neither | nor | rather\sthan | instead\sof | except | unlike"
    r" | any(?:one|thing|where)\sbut | (?<!none\s)other\sthan )\b .*"
)
_SUBJECT = _pattern(
    r"(?: he | she | it | they | the | this | that | his | her | its | their | there | an? )\s"
)
_OR = _pattern(rf"{_GAP}or\b")
_UNTIL = _pattern(r"\buntil\b .*")
_ITEM = re.compile(r"(?:\d+[.)]|[-*•])\s+(\S.*)")


def find_claim(completion: str, question: str) -> Claim:
    """What the completion commits to as the answer to the question.

    A list of several items commits to "one or two or three".
    """
    items = _items(completion)
    if items:
        return Claim(" or ".join(items))
    claim = Claim("")
    for sentence in _telling(completion, question):
        if claim.text and _OR.match(sentence):
            claim = Claim(f"{claim.text} {sentence}", claim.aside)
            continue
        replaces = (
            _CORRECTION.match(sentence)
            or _YES_NO.fullmatch(claim.text)
            or (claim.silence and _GUESS.search(sentence))
            or _is_vague(claim.text, question)
            or (not claim.text and not claim.silence and not re.search(f"[{MARKS}]", claim.aside))
        )
        if replaces:
            read = _claim_of(sentence)
            claim = Claim(read.text, f"{claim.aside} {read.aside}".strip(), read.silence)
    return claim


def _items(completion: str) -> list[str]:
    """The items of a list: two with numbers or bullets, or three bare lines."""
    lines = [line.strip() for line in completion.splitlines() if line.strip()]
    found = [_ITEM.fullmatch(line) for line in lines]
    items = [item[1] for item in found if item]
    if len(items) > 1 and found[0]:
        return items
    bare = all(
        len(words(line)) < 7 and line[-1] not in ".:?!" and ": " not in line for line in lines
    )
    return lines if bare and len(lines) > 2 else []


def _is_vague(text: str, question: str) -> bool:
    """Whether a sentence about the subject ("It was built by an engineer") names nothing new."""
    names = set(re.findall(r"\b[A-Z]\w*", text)[1:]) - set(re.findall(r"\w+", question))
    told = re.search(f"[{MARKS}]", text) or names or find_values(text)
    return bool(_SUBJECT.match(text)) and not told


def _telling(completion: str, question: str) -> Iterator[str]:
    """The sentences that are neither filler nor an echo of the question."""
    asked = set(words(question))
    rest = completion
    while sentence := extract_answer(rest):
        rest = rest[rest.index(sentence) + len(sentence) :]
        said = words(sentence)
        echo = sentence.endswith("?") and len(said) > 2 and asked.issuperset(said[1:])
        lead = sentence.endswith(":") and rest.strip()
        if not (echo or lead or _FILLER.fullmatch(sentence)):
            yield sentence


def _claim_of(sentence: str) -> Claim:
    parts = [part for part in _PART_END.split(_CORRECTED.split(sentence)[-1]) if _said(part)]
    main = [part for part in parts if len(parts) == 1 or not _SIDE.match(part)] or parts
    kept, silence = _committed(main)
    if sentence.endswith("?") and _ASKING.search(sentence):
        kept, silence = [], silence or "asks back"
    pairs = [_without_denial(part) for part in kept]
    aside = [part for part in parts if part not in kept] + [denied for _, denied in pairs]
    return Claim(
        ", ".join(claimed.strip() for claimed, _ in pairs if _said(claimed)),
        " ".join(aside),
        silence,
    )


def _committed(parts: list[str]) -> tuple[list[str], str | None]:
    """The parts up to a refusal that follows them, or those from a guess on; and why none is."""
    kept: list[str] = []
    silence: str | None = None
    for part in parts:
        refusal, guess = _REFUSAL.search(part), _GUESS.search(part)
        if guess and (silence or (refusal and refusal.start() < guess.start())):
            kept, silence = [part[guess.end() :]], None
        elif refusal and kept:
            break
        elif refusal:
            silence = "refuses"
        elif _HEDGE.search(part) and not guess and not _OR.match(part):
            silence = silence or (None if kept else "hedges")
        elif not (silence or _FILLER.fullmatch(part) or (_YES_NO.fullmatch(part) and parts[1:])):
            kept.append(part)
    return kept, silence


def _without_denial(part: str) -> tuple[str, str]:
    """What the part claims and what it denies: "not A until B" claims B."""
    claimed, denied = [], []
    for clause in _CLAUSE_END.split(part):
        denial, until = _DENIED.search(clause), _UNTIL.search(clause)
        start = 0 if _DENIED_VERB.search(clause) else denial.start() if denial else len(clause)
        end = until.start() if until else len(clause)
        claimed.append(clause[:start] + clause[max(start, end) :])
        denied.append(clause[start:end])
    if not any(denied):
        return part, ""
    return " and ".join(filter(_said, claimed)), " ".join(filter(_said, denied))


def _said(text: str) -> bool:
    return bool(re.search(rf"[\w{MARKS}]", text))
