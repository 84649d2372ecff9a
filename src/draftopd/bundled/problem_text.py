"""The wording of the reasoning problems: names, things and sentence patterns.

``{A}`` is the protagonist, ``{F}`` a friend, ``{she}`` the protagonist's pronoun, ``{things}`` what
is counted, ``{n}`` a number.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = (
    ("Mia", "she"), ("Leo", "he"), ("Ava", "she"), ("Omar", "he"), ("Nina", "she"), ("Sam", "he"),
    ("Zoe", "she"), ("Ben", "he"), ("Ruth", "she"), ("Kofi", "he"), ("Ines", "she"), ("Tom", "he"),
    ("Lena", "she"), ("Raj", "he"), ("Yuki", "she"), ("Max", "he"), ("Clara", "she"), ("Ivan", "he"),
    ("Aisha", "she"), ("Noah", "he"),
)  # fmt: skip

THINGS = (
    "apples", "marbles", "stickers", "books", "pencils", "shells", "coins", "cards", "stamps", "eggs",
    "cookies", "flowers", "beads", "stones", "tickets", "buttons", "lemons", "candles", "cups", "kites",
)  # fmt: skip

PLACES = ("market", "school", "park", "shop", "fair", "beach", "farm", "library")

STARTS = (
    "{A} has {n} {things}.",
    "{A} starts the day with {n} {things}.",
    "At first, {A} has {n} {things}.",
    "There are {n} {things} on the table of {A}.",
    "{A} brings {n} {things} to the {place}.",
    "In the morning {A} counts {n} {things}.",
    "{A} keeps {n} {things} in a box.",
)

EVENTS = {
    "gain": (
        "{A} buys {n} more {things}.",
        "Then {she} finds {n} {things} at the {place}.",
        "{F} gives {A} {n} {things}.",
        "After lunch {she} gets {n} more.",
        "Then {n} more {things} arrive.",
        "{A} wins {n} {things} in a game.",
    ),
    "loss": (
        "{A} gives {n} {things} to {F}.",
        "Then {she} loses {n} of them.",
        "{A} sells {n} {things} at the {place}.",
        "Then {n} of the {things} are taken away.",
        "{F} borrows {n} {things} from {A}.",
        "Later {she} throws {n} of them out.",
    ),
    "double": (
        "Then the number of {things} doubles.",
        "{A} works hard and now has twice as many.",
        "{F} doubles what {A} has.",
    ),
    "triple": (
        "Then the number of {things} triples.",
        "After a good week {she} has three times as many.",
        "{F} triples what {A} has.",
    ),
    "halve": (
        "{A} gives half of the {things} to {F}.",
        "Then {she} loses half of them.",
        "Half of the {things} are sold at the {place}.",
    ),
    "price": (
        "{A} sells all the {things} for {n} dollars each.",
        "Each of the {things} is worth {n} dollars.",
        "At the {place} {she} gets {n} dollars for each one.",
    ),
    "share": (
        "{A} packs the {things} into bags of {n}.",
        "Then {she} puts them in bags, {n} in each bag.",
        "{F} helps to fill bags with {n} {things} each.",
    ),
    "more": (
        "{F} has {n} more {things} than {A}.",
        "{F} owns {n} more than that.",
    ),
    "fewer": (
        "{F} has {n} fewer {things} than {A}.",
        "{F} owns {n} fewer than that.",
    ),
    "together": (
        "{F} has {n} {things} and they put all of them together.",
        "{F} comes with {n} {things} and they share one pile.",
    ),
}

QUESTIONS = {
    "count": (
        "How many {things} does {A} have now?",
        "How many {things} are there in the end?",
        "What is the number of {things} at the end?",
    ),
    "price": ("How many dollars is that?", "How much money does {A} get?"),
    "share": ("How many bags are there?", "How many bags does {A} need?"),
    "more": ("How many {things} does {F} have?",),
    "fewer": ("How many {things} does {F} have?",),
    "together": ("How many {things} do they have together?", "How many {things} are in the pile?"),
}

OPENINGS = (
    "Let me think.",
    "Okay, let me work this out step by step.",
    "We need to follow the {things}.",
    "Let us go through the story.",
    "I will track the number of {things}.",
    "Okay, so this is about {A} and the {things}.",
    "Let me go one step at a time.",
)

RESTATES = (
    "{A} starts with {n}.",
    "At the start there are {n} {things}.",
    "The first number is {n}.",
    "We begin with {n} {things}.",
    "{A} has {n} at first.",
)

CLAUSES = {
    "gain": ("{she} gets {n} more", "we add {n}", "{n} more {things} come in", "the pile grows by {n}"),
    "loss": ("{she} gives up {n}", "we take away {n}", "{n} {things} are gone", "the pile shrinks by {n}"),
    "double": ("the number doubles", "we multiply by {n}", "{she} has twice as many"),
    "triple": ("the number triples", "we multiply by {n}", "{she} has three times as many"),
    "halve": ("half of them are gone", "we divide by {n}", "only half is left"),
    "price": ("each one brings {n} dollars", "we multiply by the price of {n}", "the price is {n} each"),
    "share": ("each bag holds {n}", "we divide by {n} for the bags", "the bags take {n} each"),
    "more": ("{F} has {n} more", "for {F} we add {n}"),
    "fewer": ("{F} has {n} fewer", "for {F} we take away {n}"),
    "together": ("{F} adds {n} {things}", "together with {n} from {F}"),
}

FRAMES = (
    "{clause}, so {equation}.",
    "then {clause}: {equation}.",
    "next, {clause}, which gives {equation}.",
    "now {clause}, and {equation}.",
    "after that {clause}. That makes {equation}.",
    "since {clause}, we get {equation}.",
    "{clause}. {equation}.",
)

REMARKS = (
    "That leaves {n}.",
    "Good, we are at {n} now.",
    "Wait, let me check. Yes, {n} is right.",
    "So far {n}.",
)

CLOSINGS = (
    "So the answer is {n}.",
    "That is all, so we get {n}.",
    "The result is {n}.",
    "I am done, it is {n}.",
)

ANSWERS = {
    "count": ("There are {n} {things}.", "{A} has {n} {things}.", "The answer is {n}."),
    "price": ("{A} gets {n} dollars.", "It is {n} dollars.", "The answer is {n}."),
    "share": ("There are {n} bags.", "{A} needs {n} bags.", "The answer is {n}."),
    "more": ("{F} has {n} {things}.", "The answer is {n}."),
    "fewer": ("{F} has {n} {things}.", "The answer is {n}."),
    "together": ("They have {n} {things}.", "The answer is {n}."),
}


@dataclass(frozen=True)
class Scene:
    """Who and what one story is about."""

    hero: str
    pronoun: str
    friend: str
    things: str
    place: str

    @classmethod
    def draw(cls, rng: random.Random) -> Scene:
        (hero, pronoun), (friend, _) = rng.sample(NAMES, 2)
        return cls(hero, pronoun, friend, rng.choice(THINGS), rng.choice(PLACES))

    def fill(self, pattern: str, n: int | None = None) -> str:
        """The pattern with this scene's names and the number ``n`` in it."""
        return pattern.format(A=self.hero, F=self.friend, she=self.pronoun, things=self.things, place=self.place, n=n)
