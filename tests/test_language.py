"""The prose of the repository is plain engineering English: no phrase of the list below.

Searched: comments and strings of Python, comments and strings of C++ and CUDA, Markdown outside
inline code. Not searched: code, `inline code`, records under docs/notes, results, checkpoints.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "csrc", "model", "bench", "tests", "docs")
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".cpp", ".md"}
SKIPPED = ("docs/notes/", "bench/results/", "model/checkpoints/", "tests/test_language.py")

# Pattern -> what to write in its place. A space also matches the line break of a comment.
PHRASES = {
    # where something is
    r"as (?:it|they) lies?": "without a copy",
    r"lies?": "is located, starts at, is stored",
    r"lying": "located, stored",
    r"stands? (?:in|at|on|there|here|together|next|behind|before|beside|still|where)": "is",
    r"where (?:it|they) stands?": "in place",
    r"besides?": "next to; compared with; also",
    r"side by side first": "packed first",
    r"beyond": "past, more than, outside",
    r"on (?:its|their) way": "in flight, in transit",
    r"to and fro": "in both directions",
    # quantities
    r"so many": "that number of; name the count",
    r"as many as there are": "one per",
    r"some \d+(?:\.\d+)?": "about N",
    r"some (?:tens|dozens|hundreds?|thousands?)": "about N",
    r"no (?:smaller|fewer|less|larger) than": "at least, at most",
    r"of none": "without one; name what is missing",
    r"none of (?:it|them) but": "only",
    r"nothing but": "only",
    r"but for": "except",
    r"is all but": "is almost",
    # what something consists of, or does
    r"(?:is|are|was|were) made of": "consists of",
    r"what [^.:;\n]{1,60} (?:is|are) made of": "the parts of",
    r"(?:make|makes|made) of (?:it|them|that|this|its|their|the)": "computes from, gives for",
    r"comes? about": "occurs",
    r"(?:is|are) to be had": "is available",
    r"(?:cannot|can|could) be had": "is (not) available",
    r"would do no work twice": "avoids duplicated work",
    r"cuts? (?:up )?into": "splits into, tiles",
    r"(?:is|are|was|were) cut (?:up )?(?:into|in|off|at|by)": "is split, is truncated",
    r"cut:": "Parallelization:",
    r"cut\.\*\*": "Parallelization.**",
    r"how the work is cut": "parallelization",
    r"goes? round": "cycles",
    r"hangs? on": "depends on",
    r"puts? right": "corrects",
    r"mend(?:s|ed|ing)?": "fix, repair",
    r"spoils?": "corrupts, propagates into",
    # personification
    r"ha(?:s|ve|d) (?:no|its|their|a) say": "does (not) affect",
    r"(?:is|are|was|were|be|been|not|it|tests?|who|that) ask(?:s|ed)?(?: for| to| again)?":
        "is requested; requires, checks, reads",
    r"if asked": "optional; with argument=...",
    r"asked for": "requested",
    r"asks for": "requires, requests",
    r"knows? (?:no|nothing|of|only|it)": "has no, supports no",
    r"(?:is|are|was|were) told": "receives, is given",
    r"wants to": "should",
    r"wants? (?:no|its|their|all|both|a|the)": "requires",
    r"(?:sees?|looks?) to it": "ensures",
    r"meets? (?:a|all|the|every)": "is processed with, reaches",
    r"nobody|somebody|anybody": "name the caller, or use the passive",
    r"to whom it concerns": "to its destination",
    r"lets? .{1,20} know": "signals",
    r"moods?": "policy",
    r"forgives?|excuses?": "allows, waives",
    r"promises? that": "guarantees that",
    # tests and limits
    r"held (?:to|against)": "limited by, compared with, checked against",
    r"hold(?:s|ing)? (?:it|them|each|all|every|that|these|those|the|both|an?|what)"
    r"(?: \w+){0,6} (?:to|against)": "checks against",
    r"proven": "verified",
    r"(?:is|are|was|were) taken(?: too| here)?(?=[.,;:])": "is accepted, is chosen, is used",
    # variants
    r"(?:kernel|other|both|two|all|these|its|four|eight|8|16|64-row) forms": "variants, layouts",
    r"(?:contiguous|masked|grouped|dense|swapped|split|absorbed|naive|this|that) form": "variant",
    r"forms? of (?:the|a|this|it|each|every) (?:kernel|op|cache|product|call)s?": "variants",
    # split-K partial sums, and other words with several meanings
    r"shares? of (?:the|a|its|each|grad_\w+)(?: \w+)? (?:sum|sums|product|result|gradient|K)":
        "partial sum",
    r"(?:writes?|adds?|sums?) (?:its|their|the|up the|all) shares?": "partial sums",
    r"add(?:s|ed|ing)? (?:up )?the shares": "reduce the partial sums",
    r"runs of (?:K|blocks|the blocks)": "K splits",
    r"survey(?:s|ed)?": "find group bounds",
    r"extents?(?= of (?:a|each|the) groups?)": "group bounds",
    # turns of speech
    r"said (?:another|otherwise) way|in other words": "say it once",
    r"whatever (?:is|it|stands|that|these|those|was|the|comes|lies)": "any value; name it",
    r"may be anything": "is not read",
    r"(?:is|are|does) no more(?= (?:read|used|needed|there)\b)|(?:read|used|needed) no more":
        "no longer",
    r"at hand": "available",
    r"comes? to the same": "is equivalent",
    r"that is to say": "omit",
    r"not a (?:bit|byte|line|word) of": "no",
    r"by way of": "through, via",
    r"begun": "started; ceil(n / 128)",
    r"tells? (?:it|them|these|those|the two) apart": "distinguishes",
    r"told apart": "distinguished",
    r"in bad order": "unsorted",
}  # fmt: skip


def body_of(pattern: str) -> str:
    """The regex of `pattern`, whose spaces may cross the line break of a comment."""
    body = re.sub(r"(?<!\(\?!)(?<!\(\?=) ", r"[\\s#/*>]+", pattern.lower())
    return body if body[-1] in ":*" else body + r"\b"


ADVICE = {re.compile(body_of(pattern)): advice for pattern, advice in PHRASES.items()}
# One scan without named groups: ten times as fast as one for each phrase.
ANY = re.compile(rf"(?<![\w-])(?:{'|'.join(map(body_of, PHRASES))})")
_CPP = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.DOTALL)
_INLINE_CODE = re.compile(r"``[^`]+``|`[^`\n]+`")
_PYTHON_PROSE = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}


def prose_spans(text: str, suffix: str) -> list[tuple[int, int]]:
    """(start, end) of each comment and string of a source; all of a Markdown file."""
    if suffix == ".md":
        return [(0, len(text))]
    if suffix != ".py":
        return [m.span() for m in _CPP.finditer(text) if m.group()[0] != "'"]
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return [
        (starts[t.start[0] - 1] + t.start[1], starts[t.end[0] - 1] + t.end[1])
        for t in tokenize.generate_tokens(io.StringIO(text).readline)
        if t.type in _PYTHON_PROSE
    ]


def findings(text: str, suffix: str) -> list[tuple[int, str, str]]:
    """(line, phrase, advice) of each banned phrase in the prose of `text`."""
    lowered = text.lower()
    lowered = lowered if len(lowered) == len(text) else text
    hits = list(ANY.finditer(lowered))
    if not hits:
        return []
    spans = prose_spans(text, suffix)
    code = [m.span() for m in _INLINE_CODE.finditer(text)]
    found = []
    for match in hits:
        at = match.start()
        if any(a <= at < b for a, b in spans) and not any(a <= at < b for a, b in code):
            phrase = " ".join(re.sub(r"[\s#/*>]+", " ", match.group()).split())
            advice = next(a for rule, a in ADVICE.items() if rule.match(lowered, at))
            found.append((text.count("\n", 0, at) + 1, phrase, advice))
    return found


def sources() -> list[Path]:
    """The files whose prose is checked."""
    paths = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*")]
    paths += [*ROOT.glob("*.md"), *ROOT.glob("*.py")]
    names = ((p.relative_to(ROOT).as_posix(), p) for p in paths if p.suffix in SUFFIXES)
    return [p for name, p in sorted(names) if not name.startswith(SKIPPED)]


def test_no_banned_phrase():
    """The failure lists every finding, with the number of them in each folder."""
    lines, folders = [], Counter()
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        for line, phrase, advice in findings(path.read_text(encoding="utf-8"), path.suffix):
            lines.append(f"{name}:{line}: {phrase!r} -> {advice}")
            parts = path.relative_to(ROOT).parent.as_posix().split("/")
            folders["/".join(parts[2:3] if parts[0] == "kernels" else parts[:2])] += 1
    counts = "\n".join(f"{n:5} {folder}" for folder, n in folders.most_common())
    if lines:
        listed = "\n".join(lines)
        pytest.fail(f"{len(lines)} banned phrases\n{counts}\n{listed}", pytrace=False)


@pytest.mark.parametrize(
    "suffix, text, lines",
    [
        (".py", "lies = 1  # it lies there\n", [1]),
        (".py", 'def f():\n    """Rows are read as they\n    lie."""\n', [2]),
        (".py", "# rows that are held\n# to a bound\n", [1]),
        (".py", 'raise ValueError(f"{x} was asked for")\n', [1]),
        (".py", "# `survey` is a name\n", []),
        (".cpp", "int lie;  // ten\n/* a row\n * beyond the end */\n", [3]),
        (".md", "A `beside` in code.\n\nA word beside it.\n", [3]),
    ],
    ids=["comment", "docstring", "two-lines", "error", "inline-code", "cpp", "markdown"],
)
def test_scanner(suffix, text, lines):
    """Prose is searched across line breaks; code and inline code are not."""
    assert [line for line, _, _ in findings(text, suffix)] == lines


def test_functions_are_named_for_what_they_do():
    """A trace, a stack and a search show the name alone, so `kernel` and `launch` say nothing."""
    vague = re.compile(r"^ *def (kernel|launch|tile|backward_kernel)\(", re.MULTILINE)
    folders = ("kernels", "bench", "model")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*.py")]
    assert not [f"{f}: {name}" for f in files for name in vague.findall(f.read_text("utf-8"))]
