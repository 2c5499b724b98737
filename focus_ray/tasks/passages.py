"""A short text is given: answer a question on it, or extract fields as JSON."""

from __future__ import annotations

import json
import random
from typing import NamedTuple

from focus_ray.tasks.task import Check, Task, exact
from focus_ray.tasks.vocabulary import (
    ANIMALS,
    CITIES,
    COLORS,
    HOBBIES,
    JOBS,
    LAST_NAMES,
    MONTHS,
    Person,
    people,
    person,
    thing,
)
from focus_ray.tasks.wording import article, capitalize, join


class Fact(NamedTuple):
    """A thing said of a person: the predicate, a question for it, the answer."""

    predicate: str
    question: str
    answer: str


def _facts(rng: random.Random, someone: Person) -> list[Fact]:
    """Two facts of different kinds."""
    name = someone.name
    city, job, hobby = rng.choice(CITIES), rng.choice(JOBS), rng.choice(HOBBIES)
    pet, color = rng.choice(ANIMALS), rng.choice(COLORS)
    a_job = f"{article(job)} {job}"
    kinds = [
        Fact(f"lives in {city}", f"Where does {name} live?", f"{name} lives in {city}."),
        Fact(f"works as {a_job}", f"What is the job of {name}?", f"{name} is {a_job}."),
        Fact(f"enjoys {hobby}", f"What does {name} enjoy?", f"{name} enjoys {hobby}."),
        Fact(f"has a pet {pet}", f"What pet does {name} have?", f"{name} has a pet {pet}."),
        Fact(
            f"drives {article(color)} {color} car",
            f"What color is the car of {name}?",
            f"The car of {name} is {color}.",
        ),
    ]
    return rng.sample(kinds, 2)


def reading(rng: random.Random) -> Task:
    """Who is what in a passage of two to four people."""
    sentences: list[str] = []
    facts: list[tuple[Person, Fact]] = []
    for someone in people(rng, rng.randint(2, 4)):
        first, second = _facts(rng, someone)
        sentences.append(f"{someone.name} {first.predicate} and {second.predicate}.")
        facts += [(someone, first), (someone, second)]
    rng.shuffle(sentences)
    someone, fact = rng.choice(facts)
    question, answer = fact.question, fact.answer
    unique = sum(other.predicate == fact.predicate for _, other in facts) == 1
    if unique and rng.random() < 0.35:
        question, answer = f"Who {fact.predicate}?", f"{someone.name} {fact.predicate}."
    passage = " ".join(sentences)
    asked = rng.choice(
        (
            f"{passage}\nQuestion: {question}",
            f"Read the passage and answer the question.\n{passage}\n{question}",
            f"{passage} {question}",
            f"{passage}\n\n{question}",
        )
    )
    return exact("reading", asked, answer)


def extraction(rng: random.Random) -> Task:
    """Some fields of a text as one JSON object, in the order asked."""
    draw = rng.random()
    text, fields = _profile(rng) if draw < 0.7 else _order(rng) if draw < 0.85 else _event(rng)
    keys = join(list(fields))
    question = rng.choice(
        (
            f"Extract {keys} as JSON: {text}",
            f"{text}\nReturn a JSON object with the keys {keys}.",
            f"Read the text and output JSON with {keys}.\nText: {text}",
            f"Extract the fields {keys} from this text as JSON.\n{text}",
        )
    )
    answer = json.dumps(fields)
    return Task("extraction", question, answer, Check.JSON, (answer,))


Fields = dict[str, object]


def _some(rng: random.Random, fields: Fields, count: int) -> Fields:
    return {key: fields[key] for key in rng.sample(list(fields), count)}


def _profile(rng: random.Random) -> tuple[str, Fields]:
    someone = person(rng)
    full = f"{someone.name} {rng.choice(LAST_NAMES)}"
    age, city, job = rng.randint(18, 80), rng.choice(CITIES), rng.choice(JOBS)
    hobby, color = rng.choice(HOBBIES), rng.choice(COLORS)
    told: list[tuple[str, Fields]] = [
        (f"{someone.He} lives in {city}.", {"city": city}),
        (f"{someone.He} works as {article(job)} {job}.", {"job": job}),
        (f"{capitalize(someone.his)} hobby is {hobby}.", {"hobby": hobby}),
        (f"{capitalize(someone.his)} favorite color is {color}.", {"color": color}),
    ]
    told = [(f"{full} is {age} years old.", {"age": age}), *rng.sample(told, rng.randint(1, 4))]
    fields: Fields = {key: value for _, part in told for key, value in part.items()}
    text = " ".join(sentence for sentence, _ in told)
    return text, {"name": full, **_some(rng, fields, rng.randint(1, len(fields)))}


def _order(rng: random.Random) -> tuple[str, Fields]:
    customer = f"{person(rng).name} {rng.choice(LAST_NAMES)}"
    item, city = thing(rng).many, rng.choice(CITIES)
    quantity, price = rng.randint(2, 99), rng.randint(1, 50)
    text = (
        f"Order {rng.randint(100, 999)}: {customer} ordered {quantity} {item} for ${price} each, "
        "to be "
        f"sent to {city}."
    )
    fields: Fields = {
        "customer": customer,
        "item": item,
        "quantity": quantity,
        "price": price,
        "city": city,
    }
    return text, _some(rng, fields, rng.randint(2, 5))


def _event(rng: random.Random) -> tuple[str, Fields]:
    guest = f"{person(rng).name} {rng.choice(LAST_NAMES)}"
    date, city = f"{rng.choice(MONTHS)} {rng.randint(1, 28)}", rng.choice(CITIES)
    event = rng.choice(("meeting", "concert", "party", "lecture", "workshop", "dinner"))
    hour = f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}"
    text = f"The {event} with {guest} takes place in {city} on {date} at {hour}."
    fields: Fields = {"event": event, "person": guest, "city": city, "date": date}
    return text, _some(rng, fields, rng.randint(2, 4))
