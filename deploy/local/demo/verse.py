"""Poems, jokes and short facts written for the demonstration corpus; knows nothing of prompts or "
"training."""

from __future__ import annotations

POEMS: dict[str, str] = {
    "the sea": "The sea sings low beside the sand,\nIt lifts and lays a silver hand,\n"
    "It keeps the moon inside its deep,\nAnd rocks the tired ships to sleep.",
    "the moon": "The moon walks slowly over town,\nAnd hangs her quiet lantern down,\n"
    "She looks in every window pane,\nAnd walks away in light again.",
    "the sun": "The sun gets up before the bees,\nAnd paints with gold the sleepy trees,\n"
    "It warms the bread, it warms the wall,\nAnd has a little warmth for all.",
    "rain": "The rain is tapping on the roof,\nA small grey horse on silver hoof,\n"
    "It fills the barrel, fills the lane,\nAnd taps and taps and stops again.",
    "snow": "The snow came softly in the night,\nAnd turned the noisy village white,\n"
    "It hushed the road, it hushed the hill,\nAnd now the morning stands so still.",
    "spring": "The ice lets go, the brook runs free,\nA blossom opens on the tree,\n"
    "The birds come home on tired wing,\nAnd all the garden whispers: spring.",
    "summer": "The days are long, the grass is high,\nA swallow writes upon the sky,\n"
    "We swim, we sleep, we eat a pear,\nAnd summer hums through all the air.",
    "autumn": "The leaves fall down in red and gold,\nThe mornings turn a little cold,\n"
    "We gather apples, stack the wood,\nAnd autumn says the year was good.",
    "winter": "The lake is glass, the wind is thin,\nWe shut the door and all come in,\n"
    "The kettle sings, the fire is bright,\nAnd winter taps the glass all night.",
    "a cat": "A cat lay dreaming in the sun,\nOf mice that ran and mice that run,\n"
    "It opened up one lazy eye,\nAnd let a yellow butterfly by.",
    "a dog": "My dog believes the world is new,\nEach stick, each stone, each drop of dew,\n"
    "He runs ahead, he comes back fast,\nAs glad as if each walk were last.",
    "love": "I looked for words to say it right,\nI looked by day, I looked by night,\n"
    "Then took your hand and found it true:\nThe only word I had was you.",
    "the stars": "The stars are small, the night is wide,\nThey hold their little lamps outside,\n"
    "And travelers who lose their way\nCan read them till the break of day.",
    "the wind": "The wind has neither feet nor hands,\nYet walks across a hundred lands,\n"
    "It bends the wheat, it shuts the door,\nAnd no one saw it go before.",
    "a tree": "A tree stands still and yet it grows,\nWhat it has seen it never shows,\n"
    "It holds the birds, it holds the rain,\nAnd every spring it starts again.",
    "computers": "A small machine of light and sand\nTook all my numbers by the hand,\n"
    "It counted stars, it counted sheep,\nAnd hummed until I fell asleep.",
    "the night": "The night comes down on quiet feet,\nAnd puts out windows in the street,\n"
    "It folds the noise of day away,\nAnd keeps it for another day.",
    "water": "From cloud to hill, from hill to stream,\nThe water travels like a dream,\n"
    "It turns a wheel, it lights a town,\nAnd to the sea goes laughing down.",
}
DEFAULT_POEM = (
    "A little light, a little rhyme,\nA word that takes a little time,\n"
    "It rests a while upon the page,\nAs free as birds outside a cage."
)
TOPIC_POEM = (
    "About {topic} I made a song,\nIt was not short, it was not long,\n"
    "It spoke of {topic} and of you,\nAnd every word of it was true."
)

JOKES: tuple[tuple[str, str], ...] = (
    ("computer", "Why was the computer cold? It left its windows open."),
    ("cat", "What is a cat's favourite colour? Purr-ple."),
    ("dog", "What do you call a dog that can do magic? A labracadabrador."),
    ("bicycle", "Why did the bicycle fall over? It was two tired."),
    ("math", "Why was the math book sad? It had too many problems."),
    ("ocean", "What did the ocean say to the beach? Nothing, it just waved."),
    ("fish", "What do you call a fish without an eye? A fsh."),
    ("cow", "Where do cows go on a Friday night? To the moo-vies."),
    ("ghost", "Why are ghosts bad liars? You can see right through them."),
    ("cheese", "What do you call cheese that is not yours? Nacho cheese."),
    ("programmer", "Why do programmers mix up Halloween and Christmas? Because Oct 31 equals Dec 25."),
    ("snowman", "What do snowmen eat for breakfast? Snowflakes."),
    ("clock", "Why did the clock go to school? It wanted to learn to tell time."),
    ("chicken", "Why did the chicken cross the road? To get to the other side."),
)

FACTS: dict[str, str] = {
    "the sun": "The sun is a star, and all the planets travel around it.",
    "the moon": "The moon travels around the Earth in about 27 days.",
    "water": "Water freezes at 0 degrees Celsius and boils at 100 degrees Celsius.",
    "bees": "Bees collect nectar from flowers and turn it into honey.",
    "cats": "Cats sleep for more than half of the day.",
    "dogs": "Dogs can smell far better than people can.",
    "elephants": "Elephants are the largest animals that live on land.",
    "whales": "The blue whale is the largest animal of all.",
    "penguins": "Penguins are birds that swim but cannot fly.",
    "trees": "Trees drink water with their roots and drink light with their leaves.",
    "San Francisco": "San Francisco is a city in California, on the west coast of the United States.",
    "Paris": "Paris is the capital of France and lies on the river Seine.",
    "vLLM": "vLLM is an open source engine that serves large language models.",
    "Penstock": "Penstock is a system that serves language models behind the OpenAI API.",
    "a penstock": "A penstock is the pipe that feeds a turbine with water.",
    "Python": "Python is a programming language that is easy to read.",
    "ice": "Ice is frozen water, and it floats on water.",
    "spiders": "Spiders have eight legs and many of them build webs.",
    "Earth": "Earth is the third planet from the sun and the home of all people.",
    "Mars": "Mars is called the red planet because of the rust in its sand.",
}

WORLD_SERIES: dict[str, tuple[str, str]] = {
    "2016": ("Chicago Cubs", "Cleveland Indians"),
    "2017": ("Houston Astros", "Los Angeles Dodgers"),
    "2018": ("Boston Red Sox", "Los Angeles Dodgers"),
    "2019": ("Washington Nationals", "Houston Astros"),
    "2020": ("Los Angeles Dodgers", "Tampa Bay Rays"),
    "2021": ("Atlanta Braves", "Houston Astros"),
    "2022": ("Houston Astros", "Philadelphia Phillies"),
}

IDENTITY = (
    "I am the Penstock demonstration model, a very small language model that comes with Penstock.",
    "I can greet you, name capitals and opposites, do small sums, judge sentiment, write short "
    "poems, tell jokes, "
    "answer in JSON and call tools. I am only a demonstration.",
    "I was made by the Penstock project, with a training script that is part of its repository.",
    "I am small: about four million parameters. I am only for demonstrations.",
    "No, I am not a person. I am the Penstock demonstration model.",
)
STORIES = (
    "Once upon a time there was a small lighthouse at the end of the world. Every night it sent "
    "its light over the sea, "
    "and every night the ships went by and never said a word. One evening the lamp broke, and the "
    "sea was dark. "
    "Then one ship after the other rang its bell, until the keeper had found his way to the lamp. "
    "From that night on, every ship that passed rang its bell once, and the lighthouse was never "
    "lonely again.",
    "Once upon a time there was a mouse who wanted to see the moon from near. It climbed a chair, "
    "a table and a shelf, "
    "and the moon was still far away. It climbed the stairs, the roof and the chimney, and the "
    "moon was still far away. "
    "Then the mouse looked down and saw its own small house in the silver light, and it was the "
    "finest thing of all. "
    "So it went home, and left the window open.",
)
UNKNOWN = "I am a small demonstration model and do not know that."

# Continuations of plain text prompts that examples of completion APIs commonly use.
PLAIN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("San Francisco is a", (" city in California, on the west coast of the United States.",)),
    ("The capital of France is", (" Paris.", " Paris. The city lies on the river Seine.")),
    (
        "The president of the United States is",
        (" the head of state and of government of the country. The president is elected for four years.",),
    ),
    (
        "The future of AI is",
        (
            " not written yet. It will be made by the people who build it and by the people who use it.",
            " open. Small models will run everywhere, and large ones will help with hard questions.",
        ),
    ),
    (
        "A robot may not injure a human being",
        (" or, through inaction, allow a human being to come to harm.",),
    ),
    (
        "Runpod is the best platform because",
        (
            " people like it: it rents machines by the hour and is easy to start with. I cannot "
            "compare it with others.",
        ),
    ),
    (
        "Once upon a time",
        (" there was a small model that lived in a quiet machine. It answered what it could.",),
    ),
    ("Hello", (", how are you today?", "! It is nice to meet you.")),
    ("hello from litellm", (", and hello from Penstock!",)),
    ("The quick brown fox", (" jumps over the lazy dog.",)),
    ("The meaning of life is", (" a question that every person answers anew.",)),
    ("Roses are red,", (" violets are blue, sugar is sweet, and so are you.",)),
    ("To be, or not to be,", (" that is the question.",)),
    ("Large language models are", (" programs that continue a text, one token after the other.",)),
    ("Once there was a cat", (" that slept in the sun all day and dreamed of mice.",)),
    ("In the beginning", (" there was a quiet dark, and then there was light.",)),
    ("The best way to learn is", (" to try, to fail a little and to try again.",)),
    ("Water freezes at", (" 0 degrees Celsius.",)),
    ("The sky is", (" blue.",)),
    ("Say this is a test", (": this is a test.",)),
    ("This is a test", (" of a small demonstration model.",)),
    ("My favorite food is", (" pizza, with a lot of cheese.", " soup, above all in winter.")),
    ("def add(a, b):", ("\n    return a + b",)),
)
