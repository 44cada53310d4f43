"""A reward of sentiment by a word list (VADER: Hutto and Gilbert 2014), which no training here sees."""

from __future__ import annotations

from collections.abc import Sequence

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

_analyzer = SentimentIntensityAnalyzer()


def sentiment(responses: Sequence[str]) -> list[float]:
    """The compound score of each response, from −1 to 1."""
    return [_analyzer.polarity_scores(response)["compound"] for response in responses]
