"""What the page docs/explore.md is told: rates, words and messages are those of the package."""

from __future__ import annotations

import inspect
import json
import math

import pytest

import fusedlr
from fusedlr.schedule import CONSTRUCTORS, page, readings, spec


def test_an_empty_address_shows_the_run_of_the_readme():
    shown = page.show("")
    (one,) = shown["schedules"]
    schedule = fusedlr.cosine(200, 4000)
    assert one["text"] == repr(schedule) and not one["problem"] and not shown["problems"]
    assert one["words"] == schedule.describe(2e-4).splitlines()
    assert shown["curves"][0]["rates"] == [schedule.lr_at(k, 2e-4) for k in shown["steps"]]
    assert shown["steps"][0] == 0 and shown["steps"][-1] == 4000
    assert one["half"] == repr(fusedlr.cosine(200, 2000))
    assert {row["label"]: row["cells"] for row in shown["rows"]} == {
        "first update, k = 0": ["0 (0 %)"],
        "highest update": ["0.0002 (100 %) at k = 200"],
        "last update": ["3.41745e-11 (1.71e-05 %) at k = 3999"],
        "warm-up": ["200 updates, 5 % of the run"],
        "update k = 1": ["1e-06 (0.5 %)"],
        "update k = 200": ["0.0002 (100 %)"],
        "update k = 4000": ["0 (0 %), past the end"],
    }
    assert shown["total_steps"] == fusedlr.total_steps(10_000, 4, 8, 3, 1)


def test_the_fragment_of_an_answer_gives_the_same_answer():
    text = "schedule=linear(10,100)&schedule=warmup_stable_decay(5,10,50,decay_type='1-sqrt')"
    shown = page.show(f"#{text}&reading=literal&peak=1e-3&updates=7&epochs=2.5")
    assert page.show(shown["fragment"]) == shown
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    # programs that recognize links in a text take no bracket or apostrophe at the end for a part of one
    assert shown["fragment"].endswith("peak=1e-3") and "'" not in shown["fragment"]


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        ("schedule=cosine(10,100,min_lr=1)", "min_lr=1.0 is above the peak lr=0.0002"),
        ("schedule=cosine(10,100,min_lr_ratio=2)", "min_lr_ratio=2 must be a ratio in [0, 1]"),
        ("schedule=cosine(10)", "cosine needs total_steps"),
        ("schedule=cosine(abc,100)", "abc is not a plain value"),
        ("schedule=cosin(10,100)", "'cosin' is no schedule: did you mean cosine?"),
        ("schedule=warmup_stable_decay(60,60,100)", "the stable phase would be negative"),
    ],
)
def test_a_mistake_in_a_schedule_shows_the_package_s_message(fragment, message):
    shown = page.show(f"{fragment}&schedule=linear(10,100)")
    assert message in shown["schedules"][0]["problem"]
    # the other one is drawn all the same
    assert [curve["schedule"] for curve in shown["curves"]] == [1]
    assert shown["rows"][0]["cells"] == ["–", "0 (0 %)"]


@pytest.mark.parametrize(
    ("fragment", "name", "message"),
    [
        ("peak=x", "peak", "peak='x' is not a number"),
        ("peak=0", "peak", "peak=0 must be above 0"),
        ("updates=1,b", "updates", "k='b' is not an integer"),
        ("examples=0", "run", "examples=0 must be at least 1"),
        ("colour=red", "colour", "'colour' that means nothing"),
        ("&".join(["schedule=constant()"] * 9), "schedules", "9 schedules are more than the 8"),
    ],
)
def test_other_mistakes(fragment, name, message):
    assert message in page.show(fragment)["problems"][name]


def test_a_warm_up_as_long_as_the_run_is_said():
    words = page.show("schedule=cosine(200,100)")["schedules"][0]["words"]
    assert "the warm-up is as long as the run: the peak is never reached" in words


def test_warnings_are_words():
    words = page.show("schedule=warmup_stable_decay(5,10,100,stable_steps=5)")["schedules"][0]["words"]
    assert words[0].startswith("warmup_steps=5, stable_steps=5 and decay_steps=10 make 20 updates")


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_every_argument_has_a_field_and_words(name):
    described = page.form()["constructors"][name]
    fields = {field["name"]: field for field in described["fields"]}
    assert list(fields) == list(inspect.signature(CONSTRUCTORS[name]).parameters)
    assert described["summary"] and all(field["help"] for field in fields.values())
    # what a constructor starts with is a schedule
    call = ", ".join(f"{key}={value}" for key, value in described["start"].items())
    assert spec.parse(f"{name}({call})").build()


@pytest.mark.parametrize("peak", [1.0, 2e-4])
def test_the_readings_of_a_cosine(peak):
    W, T = 400, 4000
    schedule = fusedlr.cosine(W, T, min_lr=0.0).resolve(peak)
    literal, product = readings.literal(schedule), readings.product(schedule)
    for k in range(T + 1):
        whole = 0.5 * (1 + math.cos(math.pi * k / T))
        assert literal(k) == pytest.approx(k / W if k < W else whole, abs=1e-15)
        assert product(k) == pytest.approx(min(1, k / W) * whole, abs=1e-15)
    said = readings.READINGS["literal"].consequence(schedule)
    assert "gives 97.6 % of the peak, a jump of the rate by 2.45 % of the peak" in said
    assert readings.applies(schedule)
    assert not readings.applies(fusedlr.cosine(0, T)) and not readings.applies(fusedlr.linear(W, T))
