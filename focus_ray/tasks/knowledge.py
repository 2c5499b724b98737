"""Closed sets of questions: small talk, capitals, opposites, short explanations.

Nothing can be held out of a closed set in a useful way: a capital that was never seen cannot be
known. These tasks keep ordinary chat inside what the model was taught and are not evaluated.
"""

from __future__ import annotations

import random

from focus_ray.tasks.task import Task, exact
from focus_ray.tasks.vocabulary import (
    ANIMALS,
    CITIES,
    COLORS,
    HOBBIES,
    JOBS,
    MONTHS,
    WEEKDAYS,
    people,
)

_CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris;England:London;Germany:Berlin;Spain:Madrid;Italy:Rome;Austria:Vienna;"
        "Portugal:Lisbon;Ireland:Dublin;Norway:Oslo;Greece:Athens;Japan:Tokyo;South Korea:Seoul;"
        "China:Beijing;India:New Delhi;Egypt:Cairo;Kenya:Nairobi;Nigeria:Abuja;Australia:Canberra;"
        "Canada:Ottawa;the United States:Washington, D.C.;Mexico:Mexico City;Brazil:Brasilia;"
        "Argentina:Buenos "
        "Aires;Chile:Santiago;Peru:Lima;Colombia:Bogota;Ecuador:Quito;Poland:Warsaw;"
        "Hungary:Budapest;the Czech Republic:Prague;Switzerland:Bern;Sweden:Stockholm;"
        "Finland:Helsinki;Denmark:Copenhagen;the Netherlands:Amsterdam;Belgium:Brussels;"
        "Russia:Moscow;Turkey:Ankara;Thailand:Bangkok;Vietnam:Hanoi;Cuba:Havana;Iceland:Reykjavik;"
        "Morocco:Rabat;Ghana:Accra;Ethiopia:Addis "
        "Ababa;Iran:Tehran;Iraq:Baghdad;Pakistan:Islamabad;"
        "Indonesia:Jakarta;New Zealand:Wellington"
    ).split(";")
)
_OPPOSITES = [
    pair.split()
    for pair in (
        "hot cold,big small,fast slow,happy sad,light dark,hard soft,rich poor,strong weak,early "
        "late,"
        "open closed,high low,long short,old young,new old,full empty,clean dirty,wet dry,thick "
        "thin,"
        "loud quiet,near far,up down,left right,front back,inside outside,day night,win lose,buy "
        "sell,"
        "push pull,love hate,begin end,true false,heavy light,deep shallow,wide narrow,sweet sour,"
        "polite rude,cheap expensive,sharp dull,smooth rough,asleep awake,alive dead,accept refuse,"
        "remember forget,increase decrease,float sink,lead follow"
    ).split(",")
]
_EXPLANATIONS = {
    "What is photosynthesis": (
        "Photosynthesis is how plants make food. They use sunlight, water and carbon dioxide "
        "to produce sugar and oxygen. It happens mostly in the leaves."
    ),
    "Why is the sky blue": (
        "The sky looks blue because air scatters blue light more than red light. Sunlight is "
        "spread in all directions, so we see blue from everywhere."
    ),
    "How does rain form": (
        "Warm air carries water vapor up into the sky. The vapor cools and turns into tiny "
        "drops that make clouds. When the drops grow heavy enough, they fall as rain."
    ),
    "What is gravity": (
        "Gravity is a force that pulls objects toward each other. The Earth pulls everything "
        "toward its center, which is why things fall when you drop them."
    ),
    "Why do we have seasons": (
        "We have seasons because the Earth is tilted as it travels around the Sun. When your "
        "half of the Earth leans toward the Sun, it is summer. When it leans away, it is "
        "winter."
    ),
    "What is a computer": (
        "A computer is a machine that stores and processes information. It follows "
        "instructions called programs."
    ),
    "What is the Internet": (
        "The Internet is a network that connects computers all over the world. Data travels "
        "through it in small pieces called packets."
    ),
    "How do bees make honey": (
        "Bees collect a sweet liquid called nectar from flowers. In the hive they fan it with"
        " their wings until it becomes thick. The thick liquid is honey."
    ),
    "Why do we sleep": (
        "We sleep so that the body and the brain can rest and repair themselves. Without "
        "sleep it is hard to think and stay healthy."
    ),
    "What is a volcano": (
        "A volcano is an opening in the ground where hot melted rock comes out. The rock is "
        "called magma below the ground and lava above it."
    ),
    "How do airplanes fly": (
        "Airplanes fly because their wings push air downward as they move forward. The air "
        "pushes back and lifts the wing."
    ),
    "What is recycling": (
        "Recycling means turning used things into new things. This saves energy and reduces waste."
    ),
    "What is a language model": (
        "A language model is a computer program that predicts text. I am a very small one "
        "that writes several words at the same time."
    ),
    "What is block diffusion": (
        "Block diffusion writes text in blocks. All tokens of a block start masked, and in "
        "each step the ones I am most sure of are decided. Blocks follow from left to right."
    ),
    "How does a magnet work": (
        "A magnet pulls on objects made of iron, nickel or cobalt. Opposite poles attract "
        "each other, and equal poles push each other away."
    ),
    "What is Ray": (
        "Ray is a system that runs Python programs on many machines at once. It is used to "
        "train and to serve models."
    ),
    "What is a prime number": (
        "A prime number is a whole number greater than 1 that can be divided only by 1 and by"
        " itself. The first ones are 2, 3, 5, 7 and 11."
    ),
    "What is Python": (
        "Python is a programming language. It is easy to read and is used for science, "
        "websites and machine learning."
    ),
}
_SMALL_TALK = {
    "Hello! How can I help you today?": (
        "Hello|Hi|Hey there|Good morning|Good evening|Hey|hello|hi|Hi there|Good day|Hello there"
    ),
    "I am sdar-tiny, a very small block-diffusion language model. I can solve arithmetic word "
    "problems, "
    "sort lists, extract data and write short texts.": (
        "Who are you|What are you|Tell me about yourself|What is your name|Introduce yourself|"
        "who are you|Which model are you|What model is this|Are you a robot|Are you an AI"
    ),
    "I can solve arithmetic word problems step by step, sort and reverse lists, extract fields as "
    "JSON, "
    "convert units, work with dates, answer questions about a passage, and write short stories and "
    "emails.": (
        "What can you do|How can you help me|What are your skills|Help|What can I ask you|"
        "Can you help me|I need help"
    ),
    "You are welcome! Let me know if you need anything else.": (
        "Thank you|Thanks a lot|Thanks|thx|Great"
    ),
    "I am doing well, thank you. What would you like to do?": (
        "How are you|How are you doing today|How do you do|What's up|How is it going"
    ),
    "Goodbye! Have a nice day.": "Goodbye|Bye|See you later|Good night",
    "Why did the computer go to the doctor? Because it had a virus.": (
        "Tell me a joke|Do you know a joke|Make me laugh|Say something funny"
    ),
    "I am a very small model and do not know that. I can help with arithmetic, lists, JSON, units, "
    "dates and short texts.": (
        "What do you think about politics|Who will win the election|What is the meaning of life|"
        "What is the weather today|What time is it|Who is the president|Tell me the news|"
        "What is the stock price|Can you see images|Can you browse the web|Write a program|"
        "Translate this to French|What is quantum physics|Who wrote Hamlet|Tell me a secret"
    ),
    "This is a test, and it works.": "Test|test|This is a test|Testing|Say this is a test|ping",
}


def small_talk(rng: random.Random) -> Task:
    """A greeting, a question about the model, thanks."""
    answer, questions = rng.choice(list(_SMALL_TALK.items()))
    question = rng.choice(questions.split("|"))
    return exact("small_talk", question + rng.choice(("", "", "!", ".", "?", " please")), answer)


def fact(rng: random.Random) -> Task:
    """A capital or an opposite."""
    if rng.random() < 0.6:
        country, capital = rng.choice(list(_CAPITALS.items()))
        question = rng.choice(
            (
                f"What is the capital of {country}?",
                f"Name the capital of {country}.",
                f"Which city is the capital of {country}?",
            )
        )
        return exact("fact", question, f"The capital of {country} is {capital}.")
    word, opposite = rng.choice(_OPPOSITES)
    question = rng.choice(
        (f"What is the opposite of {word}?", f"Give me the opposite of the word {word}.")
    )
    return exact("fact", question, f"The opposite of {word} is {opposite}.")


def explanation(rng: random.Random) -> Task:
    """A sentence or three on an everyday question."""
    question, answer = rng.choice(list(_EXPLANATIONS.items()))
    asked = rng.choice(
        (f"{question}?", f"{question}? Explain briefly.", f"Please explain: {question}?")
    )
    return exact("explanation", asked, answer)


_CATEGORIES = {
    "fruits": "apple banana cherry grape lemon mango orange peach pear plum".split(),
    "animals": sorted(ANIMALS),
    "colors": sorted(COLORS),
    "jobs": sorted(JOBS),
    "hobbies": sorted(HOBBIES),
    "cities": sorted(CITIES),
}


def listing(rng: random.Random) -> Task:
    """A numbered list of things of a kind."""
    if rng.random() < 0.3:
        kind, names = rng.choice((("months", MONTHS), ("days of the week", WEEKDAYS)))
        count = rng.randint(3, len(names))
        question, chosen = f"List the first {count} {kind}.", list(names[:count])
    else:
        kind = rng.choice(list(_CATEGORIES))
        count = rng.randint(3, 6)
        question = rng.choice(
            (f"List {count} {kind}.", f"Give me {count} {kind}.", f"Name {count} {kind}.")
        )
        chosen = sorted(rng.sample(_CATEGORIES[kind], count))
    return exact(
        "listing", question, "\n".join(f"{i + 1}. {name}" for i, name in enumerate(chosen))
    )


def remembering(rng: random.Random) -> Task:
    """The user says a name; the answer uses it."""
    name = people(rng, 1)[0].name
    question = rng.choice(
        (f"My name is {name}.", f"Hello, I am {name}.", f"Hi, my name is {name}!", f"I am {name}.")
    )
    return exact("small_talk", question, f"Hello {name}! How can I help you today?")
