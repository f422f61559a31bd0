"""The phrasings that questions of conversation and writing come in; knows nothing of their answers."""

from __future__ import annotations

from penstock.local.demo.words import items, lines

GREETINGS = items(
    "Hello, Hi, Hey, Good morning, Good evening, Hello there, Hi there, Hey there, Greetings, Good day"
)
GREETING_TAILS = (
    *("!", ".", "", ", Penstock!", " model!"),
    *("! Nice to meet you.", ", is anyone there?", " from litellm"),
)
WELL_BEING = lines("""
    how are you?
    how's it going
    how is it going?
    how are you today?
    how do you do?
    what's up?
    how are things?
    are you well?
""")
THANKS = lines("""
    Thanks!
    Thank you.
    Thank you very much!
    Thanks a lot.
    Great, thanks!
    thx
    Perfect, thank you!
""")
FAREWELLS = lines("""
    Bye!
    Goodbye.
    See you!
    Good night!
    See you later.
    Bye bye
    I have to go now.
""")

# One group for each text of `verse.IDENTITY`, in its order.
IDENTITY = (
    lines("""
        what llm are you
        Who are you?
        What are you?
        Which model are you?
        What model are you?
        What is your name?
        What language model are you?
        Which LLM is this?
        What AI are you?
        Are you ChatGPT?
        Are you GPT-4?
        Introduce yourself.
        Tell me about yourself.
        What model is this?
        Are you Llama?
        Who am I talking to?
        What should I call you?
        Can you tell me who you are?
    """),
    lines("""
        What can you do?
        How can you help me?
        What are you good at?
        What do you know?
        Help
        What can I ask you?
        What are your skills?
        Can you help me?
        What are you able to do?
    """),
    lines("""
        Who made you?
        Who built you?
        Who trained you?
        Where do you come from?
        Who created you?
        How were you trained?
        Who is your maker?
    """),
    lines("""
        How big are you?
        How many parameters do you have?
        Are you a large model?
        What is your size?
        How large are you?
        Are you small?
        How many parameters has this model?
    """),
    lines("""
        Are you a person?
        Are you human?
        Are you a human being?
        Are you a real person?
        Is this a human?
    """),
)
IDENTITY_OPENINGS = ("", "", "Hello, ", "Hi! ", "Please tell me: ", "One question: ", "So, ", "Hey, ")

FACT_FRAMES = lines("""
    Tell me about {}.
    Tell me something about {}.
    Give me a fact about {}.
    What do you know about {}?
    Do you know a fact about {}?
    Say something about {}.
    Explain {} to me.
    What can you tell me about {}?
""")
SERIES_FRAMES = lines("""
    Who won the world series in {}?
    Who won the {} World Series?
    Which team won the world series in {}?
    Do you know who won the world series in {}?
    Who was the winner of the {} world series?
""")
UNKNOWN_FRAMES = lines("""
    Explain {}.
    Write a program for {}.
    Summarize the history of {}.
    What is the price of {}?
    Who invented {}?
    When was {} founded?
    Write an essay about {}.
    What is the latest news on {}?
    How does {} work?
    Who wrote {}?
    What do you think of {}?
    What is the population of {}?
    Why is {} important?
    Give me a recipe for {}.
    What is the meaning of {}?
    How do I get to {}?
    Describe the theory of {}.
    How old is {}?
    Where is {}?
    What happened to {} in 1987?
    Compare {} and {}.
    Prove {}.
    Who is {}?
""")
UNKNOWN_THINGS = items("""
    quantum mechanics, general relativity, the stock market, the French Revolution, the Roman Empire,
    Bitcoin, photosynthesis, the prime minister, Shakespeare, Beethoven, linear algebra,
    a neural network, the universe, inflation, a black hole, the telephone, a steam engine, Hamlet,
    the Amazon, chess, lasagna, sorting a list, the Riemann hypothesis, a car engine, DNA, democracy,
    Napoleon, philosophy, the internet, a transformer, the World Cup, Einstein, electricity, volcanoes,
    dinosaurs, a blockchain, Kubernetes, Rust, football rules
""")

POEM_VERBS = items(
    "Write, Please write, Write me, Can you write, Compose, Give me, Tell me, I would like, I want"
)
POEM_FORMS = items(
    "a poem, a short poem, a little poem, a small poem, a short verse, a four line poem, a rhyme"
)
STORY_VERBS = items("Tell me, Write, Please write, Can you tell me, I want, Tell, Write me")
STORY_FORMS = items("a story, a short story, a long story, a bedtime story, a little story, a fairy tale")
JOKE_FRAMES = lines("""
    Tell me a joke{}.
    Do you know a joke{}?
    Can you tell me a joke{}?
    Make me laugh with a joke{}.
    I need a joke{}.
    Give me a joke{}.
    Please tell me a joke{}.
    Tell a funny joke{}.
""")

SENTIMENT_FRAMES = (
    ("Classify this sentiment: {}", "{}"),
    ("Classify the sentiment: {}", "{}"),
    ("Classify the sentiment of this text as positive or negative: {}", "{}"),
    ("Sentiment: {}", "{}"),
    ("{}\nIs this positive or negative? Answer in one word.", "{}"),
    ("Positive or negative? {}", "{}"),
    ("What is the sentiment of this sentence? {}", "The sentiment is {}."),
    ("What is the sentiment of the following text: {}", "The sentiment is {}."),
    ("Is this review positive or negative? {}", "This review is {}."),
    ("Is the following text positive or negative? {}", "This text is {}."),
    ('Would you say that "{}" is positive or negative?', "I would say that it is {}."),
)

JSON_FRAMES = lines("""
    Answer in JSON with keys {a} and {b}: {text}
    {text} Answer in JSON with keys {a} and {b}.
    Give me a JSON object with the keys {a} and {b} for this: {text}
    Extract {a} and {b} as JSON: {text}
    Return JSON with {a} and {b}. {text}
    Answer in JSON with keys "{a}" and "{b}". {text}
""")
JSON_COPY_FRAMES = lines("""
    Answer in JSON with keys {k}: {t}.
    {T}. Answer in JSON with keys {k}.
    Write this as JSON: {t}.
    Return a JSON object with {k}. {T}.
    Convert to JSON: {t}.
    Give me JSON with the keys {k}: {t}.
""")
JSON_KEYS = items("""
    name, age, city, country, color, colour, food, price, title, author, year, brand, model, size,
    weight, shape, date, time, street, email, phone, animal, fruit, sport, language, count, total,
    status, type, id, user, item, answer, capital, number
""")
ECHO_FRAMES = lines("""
    Repeat after me: {}
    Say {}
    Please say: {}
    Repeat this: {}
    Echo: {}
    Say "{}"
    Write exactly this: {}
""")
