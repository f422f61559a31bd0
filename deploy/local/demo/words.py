"""The word lists the demonstration corpus is made of; knows nothing of questions, prompts or training."""

from __future__ import annotations


def pairs(text: str) -> dict[str, str]:
    """Reads `key: value; key: value` into a dictionary."""
    entries = (entry.split(":") for entry in text.replace("\n", " ").split(";") if entry.strip())
    return {key.strip(): value.strip() for key, value in entries}


def lines(text: str) -> tuple[str, ...]:
    """Reads one entry a line."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def items(text: str) -> tuple[str, ...]:
    """Reads a comma separated list."""
    return tuple(item.strip() for item in text.replace("\n", " ").split(",") if item.strip())


CAPITALS = pairs("""
    France: Paris; Italy: Rome; Spain: Madrid; Germany: Berlin; Portugal: Lisbon; England: London;
    Ireland: Dublin; Scotland: Edinburgh; Wales: Cardiff; Norway: Oslo; Sweden: Stockholm;
    Finland: Helsinki; Denmark: Copenhagen; Iceland: Reykjavik; Poland: Warsaw; Austria: Vienna;
    Switzerland: Bern; Belgium: Brussels; the Netherlands: Amsterdam; Greece: Athens; Turkey: Ankara;
    Hungary: Budapest; Romania: Bucharest; Bulgaria: Sofia; Croatia: Zagreb; Serbia: Belgrade;
    Ukraine: Kyiv; Russia: Moscow; Estonia: Tallinn; Latvia: Riga; Lithuania: Vilnius;
    Slovakia: Bratislava; Slovenia: Ljubljana; the Czech Republic: Prague; Albania: Tirana;
    Japan: Tokyo; China: Beijing; India: New Delhi; South Korea: Seoul; Thailand: Bangkok;
    Vietnam: Hanoi; Indonesia: Jakarta; the Philippines: Manila; Nepal: Kathmandu; Pakistan: Islamabad;
    Iran: Tehran; Iraq: Baghdad; Lebanon: Beirut; Jordan: Amman; Egypt: Cairo; Morocco: Rabat;
    Tunisia: Tunis; Algeria: Algiers; Kenya: Nairobi; Ethiopia: Addis Ababa; Ghana: Accra;
    Nigeria: Abuja; Senegal: Dakar; Uganda: Kampala; Zambia: Lusaka; Canada: Ottawa;
    the United States: Washington, D.C.; Mexico: Mexico City; Cuba: Havana; Brazil: Brasilia;
    Argentina: Buenos Aires; Chile: Santiago; Peru: Lima; Colombia: Bogota; Venezuela: Caracas;
    Ecuador: Quito; Uruguay: Montevideo; Australia: Canberra; New Zealand: Wellington; Fiji: Suva;
    Jamaica: Kingston
""")

OPPOSITES = pairs("""
    hot: cold; big: small; tall: short; fast: slow; happy: sad; light: dark; up: down; left: right;
    open: closed; old: young; rich: poor; hard: soft; wet: dry; full: empty; early: late; strong: weak;
    loud: quiet; clean: dirty; day: night; good: bad; true: false; near: far; high: low; thick: thin;
    wide: narrow; deep: shallow; heavy: light; sweet: sour; brave: afraid; easy: difficult; first: last;
    in: out; on: off; push: pull; win: lose; buy: sell; love: hate; yes: no; begin: end; black: white;
    inside: outside; above: below; before: after; always: never; friend: enemy; sharp: blunt;
    smooth: rough; cheap: expensive; safe: dangerous; awake: asleep; alive: dead; give: take;
    laugh: cry; arrive: leave; summer: winter; north: south; east: west; warm: cool; cold: hot;
    small: big; slow: fast; sad: happy; dark: light; short: tall; young: old; empty: full; weak: strong;
    quiet: loud; dirty: clean; night: day; bad: good; low: high; far: near; narrow: wide; shallow: deep;
    difficult: easy; last: first; lose: win; sell: buy; white: black; dry: wet
""")

COLOURS = pairs("""
    a banana: yellow; the sky: blue; grass: green; snow: white; coal: black; a lemon: yellow;
    a tomato: red; an orange: orange; a strawberry: red; the sea: blue; milk: white; a carrot: orange;
    a frog: green; a crow: black; chocolate: brown; the sun: yellow; a plum: purple; a cucumber: green;
    a cherry: red; a flamingo: pink; an elephant: grey; a polar bear: white; blood: red; a leaf: green;
    an eggplant: purple; sand: yellow; a raven: black; a swan: white; a lime: green; a fire engine: red
""")

SOUNDS = pairs("""
    dog: woof; cat: meow; cow: moo; sheep: baa; duck: quack; pig: oink; horse: neigh; lion: roar;
    bee: buzz; snake: hiss; frog: ribbit; rooster: cock-a-doodle-doo; owl: hoot; mouse: squeak;
    wolf: howl; crow: caw; donkey: hee-haw; turkey: gobble
""")

LEGS = pairs("""
    dog: 4; cat: 4; cow: 4; horse: 4; bird: 2; duck: 2; spider: 8; ant: 6; bee: 6; butterfly: 6;
    snake: 0; fish: 0; human: 2; crab: 10; octopus: 0; elephant: 4; chicken: 2; frog: 4; lion: 4;
    mouse: 4; penguin: 2; fly: 6; tiger: 4; rabbit: 4
""")

YOUNG = pairs("""
    dog: puppy; cat: kitten; cow: calf; sheep: lamb; horse: foal; duck: duckling; lion: cub;
    pig: piglet; hen: chick; goat: kid; bear: cub; deer: fawn; swan: cygnet; kangaroo: joey;
    frog: tadpole; goose: gosling; owl: owlet; wolf: pup
""")

CATEGORIES: dict[str, tuple[str, ...]] = {
    "fruit": items("apple, banana, orange, pear, cherry, grape, lemon, plum, mango, peach, melon, kiwi"),
    "vegetable": items("carrot, potato, onion, cabbage, spinach, cucumber, pea, leek, turnip, radish"),
    "animal": items("dog, cat, horse, cow, lion, tiger, elephant, rabbit, bear, wolf, fox, monkey, giraffe"),
    "bird": items("eagle, owl, sparrow, robin, swan, crow, penguin, parrot, gull, falcon"),
    "colour": items("red, blue, green, yellow, purple, black, white, brown, pink, grey"),
    "planet": items("Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, Neptune"),
    "instrument": items("piano, guitar, violin, drum, flute, trumpet, harp, cello"),
    "tool": items("hammer, saw, drill, wrench, screwdriver, chisel, pliers"),
    "sport": items("football, tennis, hockey, rugby, golf, baseball, basketball, cricket"),
    "metal": items("iron, gold, silver, copper, tin, zinc, lead, nickel"),
}

TRANSLATIONS: dict[str, dict[str, str]] = {
    "French": pairs("""
    hello: bonjour; thank you: merci; yes: oui; no: non; water: eau; bread: pain; cat: chat; dog: chien;
    house: maison; sun: soleil; moon: lune; red: rouge; friend: ami; good night: bonne nuit;
    book: livre; milk: lait
"""),
    "Spanish": pairs("""
    hello: hola; thank you: gracias; yes: si; no: no; water: agua; bread: pan; cat: gato; dog: perro;
    house: casa; sun: sol; moon: luna; red: rojo; friend: amigo; good night: buenas noches; book: libro;
    milk: leche
"""),
    "German": pairs("""
    hello: hallo; thank you: danke; yes: ja; no: nein; water: Wasser; bread: Brot; cat: Katze;
    dog: Hund; house: Haus; sun: Sonne; moon: Mond; red: rot; friend: Freund; good night: gute Nacht;
    book: Buch; milk: Milch
"""),
}

DAYS = items("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = items(
    "January, February, March, April, May, June, July, August, September, October, November, December"
)
MONTH_DAYS = dict(zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
NUMBER_WORDS = items("""
    zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen,
    fifteen, sixteen, seventeen, eighteen, nineteen, twenty
""")

POSITIVE = items("""
    wonderful, great, excellent, amazing, fantastic, lovely, brilliant, superb, delightful, perfect,
    awesome, beautiful, outstanding, good, impressive, pleasant, charming, terrific, marvellous,
    enjoyable, splendid, nice, fabulous, incredible, magnificent, helpful, friendly, delicious,
    exciting, fun
""")
NEGATIVE = items("""
    terrible, awful, horrible, bad, disappointing, boring, dreadful, poor, disgusting, annoying,
    useless, ugly, broken, miserable, unpleasant, sad, painful, slow and buggy, rude, weak, dull, nasty,
    lousy, frustrating, a waste of time, a disaster, a mess, depressing, hopeless, unacceptable
""")
POSITIVE_CLAUSES = items("""
    I love {}, I really like {}, I enjoyed {} a lot, {} made me smile, I would recommend {} to everyone,
    I am so happy with {}, {} was worth every cent, thank you so much for {}, {} made my day,
    I cannot get enough of {}
""")
NEGATIVE_CLAUSES = items("""
    I hate {}, I really dislike {}, {} made me angry, I regret {}, I want my money back for {},
    I am so unhappy with {}, {} ruined my day, never again {}, I would not recommend {} to anyone,
    {} was not worth it
""")
SUBJECTS = items("""
    vLLM, this movie, the food, the service, this book, the hotel, the concert, my new phone,
    the weather, this song, the game, the soup, the staff, this product, Penstock, the show, the lesson,
    the train ride, this restaurant, the coffee, the party, this laptop, the museum, the film, the play,
    my holiday, the software, this library, the pizza, the update, the website, the trip, the car,
    the room, the cake, this place, the flight, the app, this chair, the story
""")

NAMES = items("""
    Ada, Alan, Grace, Linus, Maria, Tom, Anna, Ben, Clara, David, Emma, Felix, Greta, Hugo, Ida, Jonas,
    Kate, Leo, Mia, Noah, Olga, Paul, Rosa, Sam, Tara, Uma, Victor, Wendy, Xavier, Yara, Zoe, John,
    Mary, Peter, Lucy, Max, Nina, Oscar, Sophie, Daniel, Laura, Mark, Julia, Robert, Alice, Bob, Carol,
    Eve, Frank, Helen, Ivan, Jack, Karen, Louis, Martha, Nora, Omar, Priya, Quentin, Raj, Sara, Theo,
    Ursula, Vera, Walter, Yusuf, Amir, Bella, Chloe, Diego, Elena, Fatima, George, Hannah, Isaac, Jane,
    Kevin, Liam, Molly, Oliver, Rachel, Simon, Tina, Edgar, Freya, Gina, Henry, Iris, Kim, Mohamed
""")
CITIES = items("""
    Boston, Paris, London, New York, San Francisco, Tokyo, Berlin, Rome, Madrid, Chicago, Seattle,
    Dallas, Miami, Denver, Vienna, Oslo, Prague, Sydney, Toronto, Dublin, Lisbon, Cairo, Mumbai, Delhi,
    Beijing, Seoul, Moscow, Athens, Amsterdam, Brussels, Zurich, Munich, Hamburg, Milan, Naples,
    Barcelona, Porto, Lyon, Austin, Houston, Phoenix, Atlanta, Detroit, Portland, Montreal, Vancouver,
    Nairobi, Lagos, Lima, Bogota, Santiago, Helsinki, Stockholm, Copenhagen, Warsaw, Budapest, Istanbul,
    Dubai, Bangkok, Singapore, Hong Kong, Manila, Jakarta, Melbourne, Auckland, Los Angeles, San Diego,
    Palo Alto, Glasgow, Leeds, Bristol, Geneva, Basel, Graz, Turin, Venice, Krakow, Kyoto, Osaka
""")

TOPICS = items("""
    apples, bicycles, birds, boats, books, bread, bridges, candles, clocks, coffee, dragons, dreams,
    flowers, friendship, gardens, home, horses, kites, lanterns, maps, mirrors, mountains, music, owls,
    paper, pirates, rivers, robots, school, ships, shoes, silence, sleep, stones, sugar, swans, tea,
    time, trains, turtles, windows, wine, wolves, work
""")

FAVOURITES: dict[str, tuple[str, ...]] = {
    "colour": CATEGORIES["colour"],
    "fruit": CATEGORIES["fruit"],
    "animal": CATEGORIES["animal"],
    "sport": CATEGORIES["sport"],
    "city": CITIES[:40],
    "food": items("pizza, soup, rice, pasta, bread, cheese, salad, cake, sushi, curry, pancakes, noodles"),
}

_ONSETS = items(
    "b, d, f, g, h, k, l, m, n, p, r, s, t, v, w, z, br, dr, st, tr, sh, ch, kl, gr, fl, j, qu, th"
)
_VOWELS = items("a, e, i, o, u, ai, ea, ou, ia, y")
_CODAS = ("", "", "", "n", "r", "l", "s", "m", "t", "x", "nd", "ck")


def invented(syllables: list[int]) -> str:
    """Makes a pronounceable word out of random integers, so that copying is learnt for words never seen.

    Args:
        syllables: one non-negative integer a syllable; any size, taken modulo the lists' lengths.
    """
    parts = []
    for number in syllables:
        number, onset = divmod(number, len(_ONSETS))
        number, vowel = divmod(number, len(_VOWELS))
        parts.append(_ONSETS[onset] + _VOWELS[vowel] + _CODAS[number % len(_CODAS)])
    return "".join(parts).capitalize()
