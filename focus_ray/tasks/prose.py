"""Free text: stories, e-mails, explanations. Checked only for what must occur in it."""

from __future__ import annotations

import random

from focus_ray.tasks.task import Check, Task
from focus_ray.tasks.vocabulary import (
    ADJECTIVES,
    ANIMALS,
    LAST_NAMES,
    PLACES,
    THINGS,
    WEEKDAYS,
    people,
)
from focus_ray.tasks.wording import article

_LINKS = ("Suddenly, ", "After a while, ", "Later that day, ", "Without a word, ", "As always, ")


def story(rng: random.Random) -> Task:
    """An animal, a friend, a thing; one to four short paragraphs."""
    hero, friend = people(rng, 2)
    animal, other, kind = rng.choice(ANIMALS), rng.choice(ANIMALS), rng.choice(ADJECTIVES)
    place, item = rng.choice(PLACES), rng.choice(THINGS).one
    a_kind = f"{article(kind)} {kind}"
    name = hero.name
    question = rng.choice(
        (
            f"Write a short story about {a_kind} {animal} named {name}.",
            f"Tell me a story about {name}, {a_kind} {animal} who lives near the {place}.",
            f"Write a short story about {name} the {animal} and a lost {item}.",
        )
    )
    acts = (
        (
            f"Once upon a time there was {a_kind} {animal} named {name} who lived near the "
            f"{place}.",
            f"Near the {place} lived {a_kind} {animal} called {name}.",
        ),
        (
            f"Every morning {hero.he} walked to the river to look for {article(item)} {item}.",
            f"One day {hero.he} found {article(item)} {item} under an old tree.",
            f"One cold morning {hero.he} lost {hero.his} favorite {item}.",
        ),
        (
            f"On the way {hero.he} met {friend.name}, a friendly {other}.",
            f"Soon {article(other)} {other} named {friend.name} came along.",
            f"Then {hero.he} heard the voice of {friend.name} the {other}.",
        ),
        (
            f'"Can you help me?" asked {name}.',
            f'"What are you doing here?" asked {friend.name}.',
            f'"Let us go together," said {friend.name}.',
        ),
        (
            f"They searched the whole {place} until the sun went down.",
            "They talked for a long time and shared some food.",
            "Together they climbed the hill and looked around.",
        ),
        (
            f"At last they found the {item} and laughed with joy.",
            f"In the end the {item} was in the grass all the time.",
            f"Finally {friend.name} had a good idea, and the problem was solved.",
        ),
        (
            f"From that day on, {name} and {friend.name} were best friends.",
            f"{name} learned that friends are worth more than any {item}.",
            f"That night {name} slept well and dreamed of new adventures.",
        ),
    )
    told = [rng.choice(acts[0])]
    detail_share = rng.choice((0.2, 0.4, 0.6))
    details = _details(rng, name, friend.name, place)
    for act in acts[1:]:
        # no detail twice: a greedy reader of memoryless details would repeat one for ever
        while details and rng.random() < detail_share:
            told.append(details.pop())
        sentence = rng.choice(act)
        if rng.random() < 0.3:
            first = sentence.split(" ")[0].strip(",")
            keeps_case = first in (name, friend.name) or sentence[0] == '"'
            sentence = rng.choice(_LINKS) + (
                sentence if keeps_case else sentence[0].lower() + sentence[1:]
            )
        told.append(sentence)
    return Task("story", question, " ".join(told), Check.CONTAINS, (name,))


def _details(rng: random.Random, name: str, friend: str, place: str) -> list[str]:
    """One sentence of each kind, in any order."""
    say = rng.choice(
        ("Do not worry", "Be careful", "Follow me", "What a surprise", "I have an idea", "Listen")
    )
    details = [
        f"The sun was {rng.choice(('warm', 'bright', 'low', 'hidden behind clouds'))}.",
        f"It was a {rng.choice(('cold', 'quiet', 'long', 'beautiful', 'strange', 'busy'))} "
        f"{rng.choice(('day', 'morning', 'evening'))}.",
        f"{name} felt "
        f"{rng.choice(('happy', 'tired', 'very curious', 'a little afraid', 'full of hope'))}.",
        f'"{say}," said {rng.choice((name, friend))}.',
        f"{friend} {rng.choice(('smiled', 'nodded', 'laughed', 'looked up', 'jumped with joy'))}.",
        f"{_a(rng.choice(ADJECTIVES))} {rng.choice(ANIMALS)} watched them from "
        f"{rng.choice(('a tree', 'the water', 'far away', 'the road'))}.",
        f"Everyone in the {place} "
        f"{rng.choice(('was asleep', 'talked about it', 'waited for news'))}.",
    ]
    rng.shuffle(details)
    return details


def _a(word: str) -> str:
    return f"{article(word).capitalize()} {word}"


_PURPOSES = {
    "meeting": (
        "asking for a meeting on {day}",
        "Meeting on {day}",
        (
            "I hope you are well. Would you have time for a short meeting on {day} at {hour} "
            "o'clock?",
            "I would like to talk about the project and the next steps.",
            "Please let me know if another time is better for you.",
        ),
    ),
    "sick": (
        "saying that I am sick on {day}",
        "Absence on {day}",
        (
            "I am sorry to tell you that I am sick and cannot come on {day}.",
            "I will finish my work as soon as I feel better.",
            "Thank you for your understanding.",
        ),
    ),
    "thanks": (
        "to say thank you for the help",
        "Thank you",
        (
            "I would like to thank you for your help.",
            "It made a big difference for our team.",
            "I hope that we can work together again soon.",
        ),
    ),
    "invitation": (
        "inviting to a party on {day}",
        "Invitation for {day}",
        (
            "We are having a small party on {day} at {hour} o'clock and would love to see you "
            "there.",
            "There will be music, food and good company.",
            "Let me know if you can come.",
        ),
    ),
    "late": (
        "saying that I will be late on {day}",
        "Late on {day}",
        (
            "I am sorry, but I will be late on {day}.",
            "My train does not arrive before noon.",
            "I will be in the office in the afternoon.",
        ),
    ),
}
_GREETINGS = (
    "I hope this email finds you well.",
    "I hope you had a good week.",
    "How are you?",
    "It was nice to see you last week.",
)
_CLOSINGS = (
    "Thank you very much.",
    "I look forward to your answer.",
    "Please call me if you have any questions.",
    "Have a great day.",
)


def email(rng: random.Random) -> Task:
    """A short formal e-mail for one of five purposes."""
    sender = people(rng, 1)[0].name
    to = f"{rng.choice(('Mr.', 'Ms.', 'Dr.', 'Professor'))} {rng.choice(LAST_NAMES)}"
    day, hour = rng.choice(WEEKDAYS), rng.randint(8, 12)
    purpose, subject, body = rng.choice(list(_PURPOSES.values()))
    asked = purpose.format(day=day)
    question = rng.choice(
        (
            f"Write an email to {to} {asked}. Sign as {sender}.",
            f"Please write a short email to {to} {asked}. My name is {sender}.",
        )
    )
    sentences = [sentence.format(day=day, hour=hour) for sentence in body]
    if rng.random() < 0.5:
        sentences.insert(0, rng.choice(_GREETINGS))
    if rng.random() < 0.4:
        sentences.append(rng.choice(_CLOSINGS))
    regards = rng.choice(("Best regards", "Kind regards", "Sincerely"))
    head = f"Subject: {subject.format(day=day)}\n\nDear {to},"
    answer = f"{head}\n\n{' '.join(sentences)}\n\n{regards},\n{sender}"
    return Task("email", question, answer, Check.CONTAINS, (f"Dear {to}", sender))
