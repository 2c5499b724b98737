"""The words tasks are made of: people, things, places. Lists only, and draws from them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

MALE_NAMES = (
    "Tom Ben Sam Leo Max Jack Noah Liam Ethan Lucas Oscar Henry Carlos Diego Omar Ravi Kenji Ivan "
    "Pablo Marcus Felix Hugo Victor Adam Aaron Peter Paul Mark James Daniel David Kevin Brian Eric "
    "George Frank Walter Simon Andre Tariq Malik Jamal Wei Hiro Nikhil Arjun Mateo Luis Jorge "
    "Stefan John Bob Tim Nick Joe Alex Will Josh Ryan Jason Michael Robert Anton Karl Jonas Milan "
    "Yusuf Ali Samir Ahmed Chen Toby Gabriel Martin Philip Andrew Steve Matthew"
).split()
FEMALE_NAMES = (
    "Anna Emma Mia Lily Zoe Ella Grace Chloe Sofia Maria Lucia Elena Priya Aisha Fatima Yuki Mei "
    "Nina Olga Tara Julia Laura Sarah Rachel Hannah Alice Clara Diana Eva Fiona Gina Helen Irene "
    "Jane Kate Linda Megan Nora Paula Rosa Susan Tina Vera Wendy Amara Leila Ingrid Carmen Bella "
    "Ruth Mary Lisa Amy Lucy Sophie Olivia Ava Isabella Natalia Katya Greta Heidi Zara Samira Noor "
    "Jasmine Victoria Charlotte Emily Jessica Monica Betty Karen"
).split()
LAST_NAMES = (
    "Smith Jones Brown Garcia Lopez Kim Patel Chen Nguyen Silva Rossi Muller Novak Cohen Khan "
    "Singh Ali Tanaka Sato Park Young King Wright Hill Scott Green Baker Adams Nelson Carter "
    "Mitchell Roberts Turner Phillips Campbell Parker Evans Edwards Collins Stewart Morris Rogers "
    "Reed Cook Bell Murphy Bailey Rivera Cooper Cox"
).split()
ANIMALS = (
    "fox rabbit bear owl mouse cat dog turtle squirrel hedgehog deer wolf lion tiger elephant "
    "penguin frog duck goat horse parrot otter badger raven"
).split()
PLACES = (
    "forest village garden castle city farm island mountain valley desert harbor library market "
    "meadow river school"
).split()
ADJECTIVES = (
    "brave clever kind lazy curious gentle proud shy tiny old young happy lonely quiet cheerful "
    "stubborn patient hungry sleepy careful"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Lisbon Dublin Oslo Athens Tokyo Seoul Beijing Mumbai "
    "Cairo Nairobi Lagos Sydney Toronto Boston Chicago Denver Seattle Austin Miami Houston Phoenix "
    "Dallas Atlanta Portland Prague Warsaw Budapest Zurich Geneva Milan Naples Lima Bogota Quito"
).split()
JOBS = (
    "teacher doctor nurse engineer baker pilot farmer lawyer chef painter writer singer dentist "
    "plumber carpenter programmer designer librarian gardener mechanic photographer architect "
    "journalist scientist accountant"
).split()
COLORS = "red blue green yellow orange purple pink brown black white gray silver gold".split()
HOBBIES = (
    "swimming painting cooking reading hiking cycling chess dancing fishing gardening singing "
    "running photography pottery tennis football knitting skating"
).split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
DAYS_IN_MONTH = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


class Noun(NamedTuple):
    """A countable thing in both numbers."""

    one: str
    many: str

    def counted(self, n: int) -> str:
        """``"1 apple"``, ``"7 apples"``."""
        return f"{n} {self.one if n == 1 else self.many}"


def _regular(words: str) -> list[Noun]:
    return [Noun(word, word + "s") for word in words.split()]


THINGS = [
    *_regular(
        "apple orange banana pear lemon cookie cupcake muffin marble sticker pencil pen crayon "
        "book "
        "comic card coin stamp shell rock flower rose tulip balloon candle button bead ribbon toy "
        "ball egg carrot onion chocolate donut bottle cup plate spoon bag basket brick nail screw "
        "notebook folder eraser magnet puzzle badge key sock shirt hat glove towel pillow lamp "
        "chair "
        "grape plum mango seed feather photo ticket poster kite drum bell doll car block star "
        "medal "
        "cake pie sweet cracker melon bean jar bun pin token stick leaflet ring chip tile pot mug"
    ),
    *(
        Noun(*pair.split())
        for pair in (
            "peach peaches,potato potatoes,tomato tomatoes,candy candies,sandwich sandwiches,"
            "box boxes,scarf scarves,cherry cherries,leaf leaves,brush brushes,berry berries,"
            "strawberry strawberries,fish fish,dress dresses,watch watches,knife knives,toy toys"
        ).split(",")
    ),
]
CONTAINERS = [
    *_regular("bag pack basket jar crate bundle carton packet tray bucket case set"),
    Noun("box", "boxes"),
]

_PLAIN_WORDS = (
    "house window table door street cloud rain snow wind storm summer winter spring autumn morning "
    "evening night moon sun sea lake bridge road train plane boat bike truck music song dance "
    "paper "
    "letter story poem movie game team player coach winner prize money bank shop store bread "
    "butter "
    "cheese milk water juice coffee tea sugar salt pepper rice soup salad pizza pasta family "
    "friend "
    "mother father sister brother uncle aunt cousin baby child student lesson class exam grade "
    "science history art math planet rocket robot computer phone screen camera battery engine "
    "wheel "
    "metal wood stone glass plastic cotton silk leather copper iron big small fast slow hot cold "
    "new "
    "long short high low light dark soft hard clean dirty rich poor strong weak early late open "
    "close push pull walk run jump swim climb throw catch build break draw write read speak listen "
    "learn think dream laugh cry smile sleep wake eat drink"
).split()
WORDS = sorted(
    {
        *_PLAIN_WORDS,
        *(thing.one for thing in THINGS),
        *ANIMALS,
        *PLACES,
        *ADJECTIVES,
        *JOBS,
        *COLORS,
        *HOBBIES,
    }
)

_ONSETS = "b c d f g h k l m n p r s t v w z br cl dr gr pl st tr sh ch th".split()
_VOWELS = "a e i o u ai ea oo".split()
_CODAS = ["", "", "n", "r", "s", "l", "x"]


@dataclass(frozen=True)
class Person:
    """A name and its pronouns, lower case."""

    name: str
    he: str
    him: str
    his: str

    @property
    def He(self) -> str:
        return self.he.capitalize()


def invented_word(rng: random.Random) -> str:
    """A pronounceable word that is in no list, so that copying is learnt and not recall."""
    syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.randint(2, 3)))
    return "".join(syllables) + rng.choice(_CODAS)


def people(rng: random.Random, count: int) -> list[Person]:
    """``count`` people with different names; one name in sixteen is invented."""
    chosen: dict[str, Person] = {}
    while len(chosen) < count:
        male = rng.random() < 0.5
        if rng.random() < 1 / 16:
            name = invented_word(rng).capitalize()
        else:
            name = rng.choice(MALE_NAMES if male else FEMALE_NAMES)
        pronouns = ("he", "him", "his") if male else ("she", "her", "her")
        chosen.setdefault(name, Person(name, *pronouns))
    return list(chosen.values())


def person(rng: random.Random) -> Person:
    """One person."""
    return people(rng, 1)[0]


def thing(rng: random.Random) -> Noun:
    """A countable thing; one in twenty-five is invented."""
    if rng.random() < 0.04:
        word = invented_word(rng).rstrip("sx")
        return Noun(word, word + "s")
    return rng.choice(THINGS)
