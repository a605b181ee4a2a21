"""Judges that no training sees: VADER, a lexicon of sentiment with rules for negation and emphasis.

It knows nothing of models. `vaderSentiment` is an optional extra.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshift.errors import InputError


def vader(texts: Sequence[str]) -> list[float]:
    """VADER's compound sentiment of each text, from -1 (most negative) to 1 (Hutto and Gilbert 2014)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise InputError("the VADER judge needs vaderSentiment; run `pip install 'meshift[quickstart]'`") from None
    analyzer = SentimentIntensityAnalyzer()
    return [float(analyzer.polarity_scores(text)["compound"]) for text in texts]
