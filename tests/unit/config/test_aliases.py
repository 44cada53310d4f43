"""Older names of keys: taken where a key of today is meant, and nowhere else."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_aligner.config.aliases import let_through, renamed

ALIASES = {"old": "new", "trainer.old": "trainer.new", "trainer.new.deep.n": "model.n", "x.y.z": "top"}


def test_overrides_of_older_names_get_two_pluses_and_others_stay_as_they_are() -> None:
    given = [
        "old=1",
        "old.a=1",
        "older=1",
        "a.old=1",
        "trainer.old.b=2",
        "trainer.olds=2",
        "~old",
        "--cfg=old",
        "new=1",
    ]
    found = let_through(given, ALIASES)
    assert found == [
        "++old=1", "++old.a=1", "older=1", "a.old=1", "++trainer.old.b=2", "trainer.olds=2", "~old", "--cfg=old",
        "new=1",
    ]  # fmt: skip
    assert let_through(tuple(given), {}) == given
    assert let_through(["aXb=1", "a.b=1"], {"a.b": "c"}) == ["aXb=1", "++a.b=1"], "a dot is a dot"


@pytest.mark.parametrize(
    ("cfg", "found"),
    [
        ({"new": 1}, {"new": 1}),
        ({"old": 2, "new": 1}, {"new": 2}),
        ({"old": 2}, {"new": 2}),
        ({"old": {"a": 2}, "new": {"a": 1, "b": 3}}, {"new": {"a": 2, "b": 3}}),
        ({"trainer": {"old": 2, "c": 5}}, {"trainer": {"new": 2, "c": 5}}),
        ({"trainer": {"old": {"deep": {"n": 2}}}, "model": {"n": 1}}, {"model": {"n": 2}}),
        (
            {"trainer": {"new": {"deep": {"n": 2}, "k": 1}}, "model": {}},
            {"trainer": {"new": {"k": 1}}, "model": {"n": 2}},
        ),
        ({"x": {"y": {"z": 1}}}, {"top": 1}),
        ({"x": {"y": {"z": 1}, "k": 2}}, {"x": {"k": 2}, "top": 1}),
        ({"x": {"y": {"z": 1, "k": 2}}}, {"x": {"y": {"k": 2}}, "top": 1}),
        ({"x": {"y": 3}}, {"x": {"y": 3}}),
        ({"x": 3}, {"x": 3}),
    ],
)
def test_a_value_under_an_older_name_takes_the_place_of_todays_and_its_empty_blocks_go(
    cfg: dict[str, Any], found: dict[str, Any]
) -> None:
    assert OmegaConf.to_container(renamed(OmegaConf.create(cfg), ALIASES)) == found


def test_a_reference_stays_one_and_each_name_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cfg = renamed(OmegaConf.create({"old": "${trainer.c}", "trainer": {"c": 1}}), ALIASES)
    assert OmegaConf.to_container(cfg) == {"trainer": {"c": 1}, "new": "${trainer.c}"}
    cfg.trainer.c = 2
    assert cfg.new == 2
    assert caplog.messages == ["old is taken as new"]
