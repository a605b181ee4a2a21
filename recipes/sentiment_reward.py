"""Rewards that anybody can read: words of praise less words of blame, and how many words are no repetition.

They are of TRL's signature, and know nothing of Meshift.
"""

import re

PRAISE = """
amazing beautiful best brilliant charming delightful enjoy enjoyable enjoyed excellent fantastic fun funny
good great happy hilarious impressive love loved lovely masterpiece moving perfect perfectly powerful
recommend strong superb terrific touching warm well wonderful worth
"""
BLAME = """
annoying awful bad bland boring cheap confusing disappointing dreadful dull fails flat forgettable hate
horrible lame mess mediocre nothing pointless poor poorly predictable ridiculous silly slow stupid terrible
unfunny waste wasted weak worse worst
"""


def praise(completions: list[str], **columns: object) -> list[float]:
    """Words of praise less words of blame per completion; a word that comes again counts once."""
    good, bad = frozenset(PRAISE.split()), frozenset(BLAME.split())
    texts = [set(re.findall(r"[a-z]+", text.lower())) for text in completions]
    return [float(len(words & good) - len(words & bad)) for words in texts]


def variety(completions: list[str], **columns: object) -> list[float]:
    """Different words per word: 1 where none comes twice, 0 where there is none."""
    texts = [re.findall(r"[a-z]+", text.lower()) for text in completions]
    return [len(set(words)) / max(1, len(words)) for words in texts]
